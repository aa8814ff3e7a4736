//! Values of options: durations, sizes and assignments.

use std::time::Duration;

/// `90`, `90s`, `5m`, `2h`, `1d`; plain numbers are seconds.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = split_unit(text)?;
    let factor = match unit {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86400,
        other => return Err(format!("unknown unit '{other}'; use s, m, h or d")),
    };
    let seconds = number
        .checked_mul(factor)
        .filter(|seconds| u32::try_from(*seconds).is_ok());
    seconds
        .map(Duration::from_secs)
        .ok_or_else(|| "too long".to_owned())
}

/// `512`, `512M`, `2G`, also with `iB` or `B`; plain numbers are MiB.
pub(super) fn mebibytes(text: &str) -> Result<u32, String> {
    let (number, unit) = split_unit(text)?;
    let factor = match unit.to_ascii_lowercase().as_str() {
        "" | "m" | "mb" | "mib" => 1,
        "g" | "gb" | "gib" => 1024,
        other => return Err(format!("unknown unit '{other}'; use M or G")),
    };
    number
        .checked_mul(factor)
        .and_then(|size| u32::try_from(size).ok())
        .ok_or_else(|| "too large".to_owned())
}

/// `NAME=value`. For environments, a bare `NAME` takes the value it has here.
pub(super) fn assignment(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some(("", _)) => Err("the name before '=' is missing".to_owned()),
        Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
        None => Err("expected NAME=VALUE".to_owned()),
    }
}

/// `NAME=value`, or `NAME` for the value that it has here.
pub(super) fn env(text: &str) -> Result<(String, String), String> {
    if text.contains('=') || text.is_empty() {
        return assignment(text);
    }
    match std::env::var(text) {
        Ok(value) => Ok((text.to_owned(), value)),
        Err(_) => Err(format!("{text} is not set here; use {text}=VALUE")),
    }
}

fn split_unit(text: &str) -> Result<(u64, &str), String> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    match number.parse() {
        Ok(number) => Ok((number, unit)),
        Err(_) if number.is_empty() => Err("expected a number".to_owned()),
        Err(_) => Err("too large".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_duration_is_its_number_times_its_unit(number in 0u32..40_000, unit in 0usize..5) {
            let (suffix, factor) = [("", 1), ("s", 1), ("m", 60), ("h", 3600), ("d", 86_400)][unit];
            let seconds = u64::from(number) * factor;
            prop_assert_eq!(duration(&format!("{number}{suffix}")).ok(), u32::try_from(seconds).ok().map(|_| Duration::from_secs(seconds)));
        }

        #[test]
        fn no_text_makes_a_parser_panic(text in "\\PC*") {
            let _ = (duration(&text), mebibytes(&text), assignment(&text));
        }

        #[test]
        fn an_assignment_splits_at_the_first_equals_sign(name in "[A-Z_]{1,8}", value in "\\PC*") {
            prop_assert_eq!(assignment(&format!("{name}={value}")), Ok((name, value)));
        }
    }

    #[test]
    fn sizes_are_mebibytes() {
        assert_eq!(mebibytes("512"), Ok(512));
        assert_eq!(mebibytes("2G"), Ok(2048));
        assert_eq!(mebibytes("2GiB"), Ok(2048));
        assert!(mebibytes("2T").is_err());
        assert!(mebibytes("").is_err());
        assert!(mebibytes("99999999999999999999").is_err());
    }
}
