//! The TOML settings file. Several ways to write a value are accepted. Errors never show values, which may be secrets.

use std::collections::BTreeMap;

use toml::{Table, Value};

use super::{Error, SETTINGS, ValueKind, read};

/// Strings that only the file can set, because the AWS SDK reads their environment variables itself.
const FILE_ONLY_STRINGS: [&str; 3] = ["s3.endpoint", "s3.access_key_id", "s3.secret_access_key"];

/// Settings that may be lists in the file. In the environment they are comma-separated.
const LISTS: [&str; 2] = ["trusted_proxies", "cors.origins"];

/// Reads and parses the file. A syntax error names the line number.
pub(super) fn parse(path: &str) -> Result<Table, Error> {
    let text = read(path)?;
    text.parse().map_err(|error: toml::de::Error| {
        let preceding = text.as_bytes().get(..error.span().map_or(0, |span| span.start)).unwrap_or(text.as_bytes());
        let line = 1 + preceding.iter().filter(|byte| **byte == b'\n').count();
        Error::Toml { path: path.to_owned(), line, reason: error.message().replace('\n', ", ") }
    })
}

/// Converts lists to comma-separated strings, and refuses values that must be strings but are not. serde would quote such a
/// value in its error, and the value may be a secret.
pub(super) fn check_strings(file: &mut Table) -> Result<(), Error> {
    let strings =
        SETTINGS.iter().filter(|(.., value_kind)| matches!(value_kind, ValueKind::Text)).map(|(_, toml_path, _)| *toml_path);
    for toml_path in strings.chain(FILE_ONLY_STRINGS) {
        let value = match toml_path.split_once('.') {
            Some((section, key)) => match file.get_mut(section) {
                Some(Value::Table(section)) => section.get_mut(key),
                Some(_) => return Err(Error::NotATable(section)),
                None => None,
            },
            None => file.get_mut(toml_path),
        };
        let Some(value) = value.filter(|value| !value.is_str()) else { continue };
        match to_text(value).filter(|_| LISTS.contains(&toml_path) && value.is_array()) {
            Some(list) => *value = Value::String(list),
            None => return Err(Error::NotAString(toml_path)),
        }
    }
    Ok(())
}

/// The value as text; the items of a list are separated by commas. `None` for a table.
fn to_text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Table(_) => None,
        Value::Array(items) => items.iter().map(to_text).collect::<Option<Vec<_>>>().map(|items| items.join(",")),
        other => Some(other.to_string()),
    }
}

/// Collects the properties with their full names: TOML parses an unquoted `security.protocol` as nested tables.
pub(super) fn flatten(table: Table, prefix: &str, properties: &mut BTreeMap<String, String>) -> Result<(), Error> {
    for (name, value) in table {
        let name = format!("{prefix}{name}");
        match (to_text(&value), value) {
            (Some(text), _) => drop(properties.insert(name, text)),
            (None, Value::Table(table)) => flatten(table, &format!("{name}."), properties)?,
            (None, _) => return Err(Error::NotAString("a list of kafka.properties")),
        }
    }
    Ok(())
}
