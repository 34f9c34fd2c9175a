//! `docs/configuration.md`, written from the table of all settings.

use std::fmt::Write as _;

use super::setting::{Kind, Setting};
use super::table;

/// The text of `docs/configuration.md`.
pub fn documentation() -> String {
    let mut text = include_str!("introduction.md").to_owned();
    for (topic, settings) in &table::TOPICS {
        let _ =
            write!(text, "\n## {topic}\n\n| variable | key in the file | value | default | meaning |\n|---|---|---|---|---|\n");
        for setting in *settings {
            let Setting { variable, key, kind, doc, .. } = setting;
            let kind = cell(&kind.to_string());
            let _ = writeln!(text, "| `{variable}` | `{key}` | {kind} | {} | {} |", default_cell(setting), cell(doc));
        }
    }
    text.push_str("\n## Variables of the command line\n\n| variable | meaning |\n|---|---|\n");
    for (variable, doc) in table::CLI_VARIABLES {
        let _ = writeln!(text, "| `{variable}` | {} |", cell(doc));
    }
    text
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

fn default_cell(setting: &Setting) -> String {
    let Some(value) = setting.default_value() else { return cell(setting.unset) };
    match (&setting.kind, value.parse::<u64>()) {
        (Kind::Number(_, "bytes"), Ok(bytes)) if bytes.is_multiple_of(1 << 40) => format!("`{value}` ({} TiB)", bytes >> 40),
        (Kind::Number(_, "bytes"), Ok(bytes)) => format!("`{value}` ({} MiB)", bytes >> 20),
        _ => format!("`{value}`"),
    }
}
