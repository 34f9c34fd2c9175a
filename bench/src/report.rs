//! The report: a table for people and JSON for programs, from the same rows.

use std::fmt::Write as _;
use std::path::Path;

use serde::Serialize;

use crate::Failure;

/// How much of a reason stands below the table.
const MAX_REASON_CHARS: usize = 160;

/// What a row must reach.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Target {
    /// The ratio of measure to limit.
    RatioAtLeast(f64),
    /// The ratio of measure to limit.
    RatioAtMost(f64),
    /// The measure itself.
    ValueAtLeast(f64),
    /// The measure itself.
    ValueAtMost(f64),
    /// Only reported.
    None,
}

/// One line of the table.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    /// What was measured, with its unit.
    pub(crate) measure: String,
    /// What it is compared with, measured in turn with it; empty if it is compared with nothing.
    pub(crate) limit: String,
    /// The values of the measure, one for each round.
    pub(crate) values: Vec<f64>,
    /// The values of the limit, one for each round.
    pub(crate) limit_values: Vec<f64>,
    pub(crate) target: Target,
}

/// The smallest, the middle and the largest of some values.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Spread {
    min: f64,
    median: f64,
    max: f64,
}

/// A row with what follows from its values.
#[derive(Serialize)]
struct Judged<'a> {
    #[serde(flatten)]
    row: &'a Row,
    value: Option<Spread>,
    limit_value: Option<Spread>,
    ratio: Option<Spread>,
    met: Option<bool>,
}

/// The state of the machine, measured before, between and after the lines.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Machine {
    /// When it was measured: before which line, or `end`.
    pub(crate) before: String,
    /// How long one fdatasync of 8 KiB took in the directory of the servers, in milliseconds.
    pub(crate) fsync_ms_p50: f64,
    pub(crate) fsync_ms_p99: f64,
    /// The load average of the last minute.
    pub(crate) load: f64,
}

/// Everything that a run found.
#[derive(Default)]
pub(crate) struct Report {
    pub(crate) mode: String,
    pub(crate) cores: usize,
    pub(crate) machine: Vec<Machine>,
    pub(crate) rows: Vec<Row>,
    /// What was not measured, and why.
    pub(crate) missing: Vec<String>,
    /// The counts with which CI would fail.
    pub(crate) exceeded: Vec<String>,
}

impl Row {
    /// A measure beside its limit.
    pub(crate) fn ratio(measure: impl Into<String>, limit: impl Into<String>, values: Vec<f64>, limit_values: Vec<f64>) -> Self {
        Self { measure: measure.into(), limit: limit.into(), values, limit_values, target: Target::None }
    }

    /// A measure that is compared with a number only.
    pub(crate) fn value(measure: impl Into<String>, values: Vec<f64>) -> Self {
        Self::ratio(measure, "", values, Vec::new())
    }

    /// The row with a target.
    pub(crate) fn target(self, target: Target) -> Self {
        Self { target, ..self }
    }

    /// The median of the measure.
    pub(crate) fn median(&self) -> Option<f64> {
        Spread::of(self.values.clone()).map(|found| found.median)
    }

    /// The ratio of each round.
    fn ratios(&self) -> Option<Spread> {
        Spread::of(self.values.iter().zip(&self.limit_values).map(|(value, limit)| value / limit).collect())
    }

    /// Whether the median reaches the target.
    fn is_met(&self) -> Option<bool> {
        let (ratio, value) = (self.ratios().map(|found| found.median), self.median());
        match self.target {
            Target::RatioAtLeast(least) => Some(ratio? >= least),
            Target::RatioAtMost(most) => Some(ratio? <= most),
            Target::ValueAtLeast(least) => Some(value? >= least),
            Target::ValueAtMost(most) => Some(value? <= most),
            Target::None => None,
        }
    }
}

impl Spread {
    /// `None` without values, or if one is not a number.
    fn of(mut values: Vec<f64>) -> Option<Self> {
        if values.iter().any(|value| value.is_nan()) {
            return None;
        }
        values.sort_unstable_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 };
        Some(Self { min, median, max })
    }
}

/// A number with its noun: `1 client`, `8 clients`.
pub(crate) fn counted(number: usize, noun: &str) -> String {
    let ending = if number == 1 { "" } else { "s" };
    format!("{number} {noun}{ending}")
}

/// A number with three significant digits, or with all digits before the point.
fn number(value: f64) -> String {
    let decimals = match value.abs() {
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 => 2,
        _ => 3,
    };
    format!("{value:.decimals$}")
}

fn target_text(target: Target) -> String {
    match target {
        Target::RatioAtLeast(least) => format!("ratio ≥ {least}"),
        Target::RatioAtMost(most) => format!("ratio ≤ {most}"),
        Target::ValueAtLeast(least) => format!("≥ {least}"),
        Target::ValueAtMost(most) => format!("≤ {most}"),
        Target::None => "–".to_owned(),
    }
}

/// Replaces the text between `<!-- NAME -->` and `<!-- end of NAME -->`.
pub(crate) fn replace_section(text: &str, name: &str, section: &str) -> Result<String, Failure> {
    let (begin, end) = (format!("<!-- {name} -->\n"), format!("<!-- end of {name} -->"));
    let found = text.split_once(&begin).and_then(|(before, rest)| Some((before, rest.split_once(&end)?.1)));
    let (before, after) =
        found.ok_or_else(|| Failure(format!("the file has no section between {} and {end}", begin.trim_end())))?;
    Ok(format!("{before}{begin}\n{section}\n{end}{after}"))
}

impl Report {
    /// The table in Markdown.
    pub(crate) fn table(&self) -> String {
        let mut table = String::from("| measure | median | limit | median | ratio: min | median | max | target | met |\n");
        table.push_str("|---|---|---|---|---|---|---|---|---|\n");
        for row in &self.rows {
            let median = |values: &[f64]| Spread::of(values.to_vec()).map_or("–".to_owned(), |found| number(found.median));
            let ratio = row.ratios().map_or(["–".to_owned(), "–".to_owned(), "–".to_owned()], |found| {
                [found.min, found.median, found.max].map(number)
            });
            let limit = if row.limit.is_empty() { "–" } else { &row.limit };
            let met = row.is_met().map_or("–", |met| if met { "yes" } else { "no" });
            let (value, limit_value) = (median(&row.values), median(&row.limit_values));
            let target = target_text(row.target);
            // Writing to a string cannot fail.
            let _ = writeln!(
                table,
                "| {} | {value} | {limit} | {limit_value} | {} | {target} | {met} |",
                row.measure,
                ratio.join(" | ")
            );
        }
        table
    }

    /// What stands below the table: the machine, and what was not measured.
    pub(crate) fn notes(&self) -> String {
        let mut notes = format!("{} run on {} cores\n\n", self.mode, self.cores);
        for Machine { before, fsync_ms_p50, fsync_ms_p99, load } in &self.machine {
            let (p50, p99) = (number(*fsync_ms_p50), number(*fsync_ms_p99));
            let _ = writeln!(notes, "machine before {before}: fdatasync p50 {p50} ms, p99 {p99} ms; load {load}");
        }
        for missing in &self.missing {
            // The rest can be a long answer of a server. The JSON has all of it.
            let first_line: String = missing.lines().next().unwrap_or_default().chars().take(MAX_REASON_CHARS).collect();
            let _ = writeln!(notes, "not measured: {first_line}");
        }
        for exceeded in &self.exceeded {
            let _ = writeln!(notes, "above the limit of CI: {exceeded}");
        }
        notes
    }

    /// Replaces the section `results` of a Markdown file with the table and what stands below it.
    pub(crate) fn write_markdown(&self, path: &Path) -> Result<(), Failure> {
        let notes = self.notes();
        let (run, machine) = notes.split_once("\n\n").unwrap_or((&notes, ""));
        let section =
            format!("{}\nThis was a {run}. The machine and what was not measured:\n\n```text\n{machine}```\n", self.table());
        let text = replace_section(&std::fs::read_to_string(path)?, "results", &section)?;
        Ok(std::fs::write(path, text)?)
    }

    /// Writes the report as JSON.
    pub(crate) fn write(&self, path: &Path) -> Result<(), Failure> {
        let rows: Vec<Judged<'_>> = self
            .rows
            .iter()
            .map(|row| Judged {
                value: Spread::of(row.values.clone()),
                limit_value: Spread::of(row.limit_values.clone()),
                ratio: row.ratios(),
                met: row.is_met(),
                row,
            })
            .collect();
        let Self { mode, cores, machine, missing, .. } = self;
        let json = serde_json::json!({"mode": mode, "cores": cores, "machine": machine, "rows": rows, "missing": missing});
        Ok(std::fs::write(path, format!("{json:#}\n"))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_met_by_the_median_of_its_ratios() {
        let row = Row::ratio("open", "insert", vec![10.0, 60.0, 80.0], vec![100.0, 100.0, 100.0]);
        assert_eq!(row.ratios(), Some(Spread { min: 0.1, median: 0.6, max: 0.8 }));
        assert_eq!(row.clone().target(Target::RatioAtLeast(0.6)).is_met(), Some(true));
        assert_eq!(row.target(Target::RatioAtMost(0.5)).is_met(), Some(false));
        assert_eq!(Row::value("memory", vec![40.0, 50.0]).target(Target::ValueAtMost(48.0)).is_met(), Some(true));
        assert_eq!(Row::value("memory", vec![f64::NAN]).target(Target::ValueAtMost(48.0)).is_met(), None);
    }

    #[test]
    fn only_the_named_section_is_replaced() {
        let text = "a\n<!-- results -->\nold\n<!-- end of results -->\nb\n";
        let replaced = replace_section(text, "results", "new\n").unwrap();
        assert_eq!(replaced, "a\n<!-- results -->\n\nnew\n\n<!-- end of results -->\nb\n");
        assert!(replace_section(text, "budgets", "new\n").is_err());
    }

    #[test]
    fn the_table_names_a_missing_limit_and_a_target() {
        let rows = vec![Row::value("memory, MiB", vec![40.0]).target(Target::ValueAtMost(48.0))];
        let table = Report { rows, ..Report::default() }.table();
        assert!(table.ends_with("| memory, MiB | 40.0 | – | – | – | – | – | ≤ 48 | yes |\n"), "{table}");
    }
}
