//! Samples, their statistics, the table for people and the JSON for everything else.

use std::time::Duration;

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde::Serialize;

/// What a sample counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) enum Unit {
    #[serde(rename = "ms")]
    Millis,
    #[serde(rename = "MiB")]
    Mebibytes,
}

/// Samples of one thing, in the order in which they were taken.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Series {
    pub(super) name: String,
    pub(super) samples: Vec<f64>,
}

impl Series {
    pub(super) fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            samples: Vec::new(),
        }
    }

    pub(super) fn time(&mut self, took: Duration) {
        self.samples.push(took.as_secs_f64() * 1000.0);
    }

    pub(super) fn push(&mut self, value: f64) {
        self.samples.push(value);
    }

    fn quantile(&self, q: f64) -> Option<f64> {
        quantile(&self.samples, q)
    }
}

/// One thing that the product does, beside the least that it could cost.
#[derive(Debug, Clone)]
pub(super) struct Row {
    pub(super) unit: Unit,
    pub(super) product: Series,
    pub(super) floors: Vec<Series>,
}

impl Row {
    pub(super) fn new(unit: Unit, product: Series, floors: impl IntoIterator<Item = Series>) -> Self {
        Self {
            unit,
            product,
            floors: floors.into_iter().collect(),
        }
    }
}

/// The value below which the share `q` of the samples lies, interpolated between neighbours.
fn quantile(samples: &[f64], q: f64) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1)?;
    #[expect(
        clippy::cast_precision_loss,
        reason = "sample counts are far below what a float counts exactly"
    )]
    let place = q * last as f64;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 0 and the last index"
    )]
    let (low, high) = (place.floor() as usize, place.ceil() as usize);
    let (low_value, high_value) = (*sorted.get(low)?, *sorted.get(high)?);
    Some(low_value + (high_value - low_value) * place.fract())
}

/// The table: a line per row, and one more for each further floor.
pub(super) fn table(rows: &[Row]) -> String {
    let mut table = Table::new();
    table
        .load_style(presets::ASCII_MARKDOWN)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header([
            "what", "unit", "n", "median", "p95", "floor", "median", "p95", "ratio",
        ]);
    for column in [2, 3, 4, 6, 7, 8] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    for row in rows {
        let unit = match row.unit {
            Unit::Millis => "ms",
            Unit::Mebibytes => "MiB",
        };
        let figures = [
            row.product.name.clone(),
            unit.to_owned(),
            row.product.samples.len().to_string(),
            figure(row.product.quantile(0.5)),
            figure(row.product.quantile(0.95)),
        ];
        let beside = |floor: &Series| {
            [
                floor.name.clone(),
                figure(floor.quantile(0.5)),
                figure(floor.quantile(0.95)),
                ratio(&row.product, floor).map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}")),
            ]
        };
        let mut floors = row.floors.iter();
        let first = floors.next().map_or_else(|| ["-"; 4].map(str::to_owned), beside);
        table.add_row(figures.into_iter().chain(first));
        for floor in floors {
            table.add_row(
                std::array::repeat::<_, 5>(String::new())
                    .into_iter()
                    .chain(beside(floor)),
            );
        }
    }
    table.to_string()
}

fn ratio(product: &Series, floor: &Series) -> Option<f64> {
    let floor = floor.quantile(0.5).filter(|floor| *floor > 0.0)?;
    Some(product.quantile(0.5)? / floor)
}

fn figure(value: Option<f64>) -> String {
    match value {
        None => "-".to_owned(),
        Some(value) if value < 10.0 => format!("{value:.2}"),
        Some(value) if value < 100.0 => format!("{value:.1}"),
        Some(value) => format!("{value:.0}"),
    }
}

/// What the figures depend on.
#[derive(Debug, Serialize)]
pub(super) struct Machine {
    pub(super) cpus: usize,
    pub(super) cpu: String,
    pub(super) kernel: String,
    pub(super) memory_mib: u64,
    pub(super) qemu: String,
    pub(super) accelerator: String,
}

/// The whole run, raw samples and all.
pub(super) fn json(machine: &Machine, quick: bool, took: Duration, rows: &[Row]) -> serde_json::Value {
    let series = |series: &Series| {
        serde_json::json!({
            "name": series.name,
            "median": series.quantile(0.5),
            "p95": series.quantile(0.95),
            "samples": series.samples,
        })
    };
    let rows: Vec<_> = rows
        .iter()
        .map(|row| {
            let mut value = series(&row.product);
            value["unit"] = serde_json::json!(row.unit);
            value["floors"] = row
                .floors
                .iter()
                .map(|floor| {
                    let mut value = series(floor);
                    value["ratio"] = serde_json::json!(ratio(&row.product, floor));
                    value
                })
                .collect();
            value
        })
        .collect();
    serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"),
        "taken_at": jiff::Timestamp::now().to_string(),
        "took_s": took.as_secs_f64(),
        "quick": quick,
        "machine": machine,
        "rows": rows,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_interpolated_between_neighbours() {
        assert_eq!(quantile(&[], 0.5), None);
        assert_eq!(quantile(&[3.0], 0.95), Some(3.0));
        assert_eq!(quantile(&[4.0, 1.0, 2.0, 3.0], 0.5), Some(2.5));
        assert_eq!(quantile(&[0.0, 100.0], 0.95), Some(95.0));
    }

    #[test]
    fn each_floor_has_its_line_and_its_ratio() {
        let series = |name: &str, value| Series {
            name: name.to_owned(),
            samples: vec![value],
        };
        let rows = [
            Row::new(
                Unit::Millis,
                series("a", 3.0),
                [series("x", 2.0), series("y", 1.0)],
            ),
            Row::new(Unit::Mebibytes, series("b", 5.0), []),
        ];
        let text = table(&rows);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2 + 3);
        assert!(lines[2].contains("1.50") && lines[3].contains("3.00"), "{text}");
        assert!(lines[4].contains("MiB"), "{text}");
    }
}
