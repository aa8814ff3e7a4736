//! What use costs. Money is a whole number of millionths of a currency unit, so sums are exact.

use std::fmt;

use serde::{Deserialize, Serialize};
use wrenn_control::utoipa;

/// The currency of all amounts.
pub const CURRENCY: &str = "EUR";

/// Milliseconds in an hour.
const HOUR: i128 = 3_600_000;
/// MiB in a GiB.
const GIB: i128 = 1024;

/// What a team has agreed to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Plan {
    /// Pays for what it uses.
    #[default]
    Standard,
    /// Has committed itself for a year, and pays less.
    Committed,
}

impl Plan {
    const ALL: [Self; 2] = [Self::Standard, Self::Committed];

    /// The word in the database and on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Standard => "standard",
            Self::Committed => "committed",
        }
    }

    /// The plan of a word.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|plan| plan.as_str() == word)
    }

    /// Millionths for one virtual CPU held for an hour.
    fn vcpu_hour(self) -> i128 {
        match self {
            Self::Standard => 50_000,
            Self::Committed => 35_000,
        }
    }

    /// Millionths for one GiB of memory held for an hour.
    fn gib_hour(self) -> i128 {
        match self {
            Self::Standard => 16_000,
            Self::Committed => 11_000,
        }
    }

    /// The price of a day's use: vCPU-milliseconds, and MiB-milliseconds of memory. What is less than a millionth is
    /// not charged.
    #[must_use]
    pub fn charge(self, cpu_ms: i64, ram_mb_ms: i64) -> Charge {
        let whole = |amount: i128| i64::try_from(amount).unwrap_or(i64::MAX);
        Charge {
            cpu_micros: whole(i128::from(cpu_ms.max(0)) * self.vcpu_hour() / HOUR),
            ram_micros: whole(i128::from(ram_mb_ms.max(0)) * self.gib_hour() / (GIB * HOUR)),
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A day's price.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Charge {
    /// For CPUs, in millionths.
    pub cpu_micros: i64,
    /// For memory, in millionths.
    pub ram_micros: i64,
}

impl Charge {
    /// Both.
    #[must_use]
    pub fn total(self) -> i64 {
        self.cpu_micros.saturating_add(self.ram_micros)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_day_of_one_cpu_and_half_a_gib() {
        let day = 24 * 3_600_000;
        let charge = Plan::Standard.charge(day, 512 * day);
        assert_eq!((charge.cpu_micros, charge.ram_micros), (1_200_000, 192_000));
        assert_eq!(charge.total(), 1_392_000);
        assert!(Plan::Committed.charge(day, 512 * day).total() < charge.total());
        for plan in Plan::ALL {
            assert_eq!(Plan::parse(plan.as_str()), Some(plan));
        }
    }

    proptest! {
        #[test]
        fn nothing_overflows_and_more_use_never_costs_less(cpu: i64, ram: i64, more in 0..i64::MAX) {
            let charge = Plan::Standard.charge(cpu, ram);
            prop_assert!(charge.cpu_micros >= 0 && charge.ram_micros >= 0);
            let grown = Plan::Standard.charge(cpu.saturating_add(more), ram.saturating_add(more));
            prop_assert!(grown.total() >= charge.total());
        }
    }
}
