//! The TOML settings file. Several ways to write a value are accepted. Errors never show values, which may be secrets.

use std::collections::BTreeMap;
use std::path::Path;

use toml::{Table, Value};

use super::error::Error;
use super::setting::{Kind, Setting};
use super::table;

/// The table of librdkafka's properties. Their names are not known here.
const PROPERTIES: &str = "kafka.properties";

/// The contents of the file.
#[derive(Default)]
pub(super) struct File {
    /// The values of the settings, by key.
    pub(super) values: BTreeMap<&'static str, String>,
    /// Kafka's properties, by their full names.
    pub(super) properties: BTreeMap<String, String>,
}

pub(super) fn read_text(path: &str) -> Result<String, Error> {
    std::fs::read_to_string(path).map_err(|error| Error::File(path.to_owned(), error))
}

impl File {
    /// Reads the file. A syntax error names the line number, an unknown key or a value of the wrong type names the key.
    pub(super) fn read(path: &Path) -> Result<Self, Error> {
        let path = path.display().to_string();
        let text = read_text(&path)?;
        let table = text.parse().map_err(|error: toml::de::Error| {
            let preceding = text.as_bytes().get(..error.span().map_or(0, |span| span.start)).unwrap_or(text.as_bytes());
            let line = 1 + preceding.iter().filter(|byte| **byte == b'\n').count();
            Error::Toml { path, line, reason: error.message().replace('\n', ", ") }
        })?;
        let mut file = Self::default();
        file.add(table, "")?;
        Ok(file)
    }

    fn add(&mut self, table: Table, prefix: &str) -> Result<(), Error> {
        for (name, value) in table {
            let key = format!("{prefix}{name}");
            if let Some(setting) = table::settings().find(|setting| setting.key == key) {
                self.values.insert(setting.key, value_text(setting, &value)?);
            } else if key != PROPERTIES && !table::settings().any(|setting| setting.key.starts_with(&format!("{key}."))) {
                return Err(Error::Unknown(vec![table::unknown(&key, table::settings().map(|setting| setting.key))]));
            } else {
                match value {
                    Value::Table(table) if key == PROPERTIES => flatten(table, "", &mut self.properties)?,
                    Value::Table(table) => self.add(table, &format!("{key}."))?,
                    _ => return Err(Error::Type { expected: format!("a table, [{key}]"), key }),
                }
            }
        }
        Ok(())
    }
}

/// The value as it would be in an environment variable. A value of the wrong type is refused.
fn value_text(setting: &Setting, value: &Value) -> Result<String, Error> {
    let right_type = match &setting.kind {
        Kind::Flag => value.is_bool(),
        Kind::Number(..) => value.is_integer(),
        Kind::List => value.is_str() || value.is_array(),
        Kind::Text | Kind::Secret | Kind::Address | Kind::KafkaAddresses | Kind::Bucket | Kind::Words(_) => value.is_str(),
    };
    to_text(value).filter(|_| right_type).ok_or_else(|| {
        let expected = match &setting.kind {
            Kind::Flag | Kind::Number(..) | Kind::List => setting.kind.to_string(),
            Kind::Text | Kind::Secret | Kind::Address | Kind::KafkaAddresses | Kind::Bucket | Kind::Words(_) => {
                "a string in quotes".to_owned()
            }
        };
        Error::Type { key: setting.key.to_owned(), expected }
    })
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
fn flatten(table: Table, prefix: &str, properties: &mut BTreeMap<String, String>) -> Result<(), Error> {
    for (name, value) in table {
        let name = format!("{prefix}{name}");
        match (to_text(&value), value) {
            (Some(text), _) => drop(properties.insert(name, text)),
            (None, Value::Table(table)) => flatten(table, &format!("{name}."), properties)?,
            (None, _) => {
                return Err(Error::Type { key: format!("{PROPERTIES}.{name}"), expected: "a list without tables".to_owned() });
            }
        }
    }
    Ok(())
}
