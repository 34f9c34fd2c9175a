//! The settings' file: TOML, as freely as people write it, and never shown where it is wrong, for it holds secrets.

use std::collections::BTreeMap;

use toml::{Table, Value};

use super::{Error, Kind, SETTINGS, read};

/// Texts that only the file has: the AWS SDK reads their variables itself.
const FILE_ONLY: [&str; 3] = ["s3.endpoint", "s3.access_key_id", "s3.secret_access_key"];

/// Lists, which the environment separates by commas.
const LISTS: [&str; 2] = ["trusted_proxies", "cors.origins"];

/// Reads a file; what is wrong with it is told by its line's number.
pub(super) fn parse(path: &str) -> Result<Table, Error> {
    let text = read(path)?;
    text.parse().map_err(|error: toml::de::Error| {
        let before = text.as_bytes().get(..error.span().map_or(0, |span| span.start)).unwrap_or(text.as_bytes());
        let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
        Error::Toml { path: path.to_owned(), line, reason: error.message().replace('\n', ", ") }
    })
}

/// Makes texts of the file's lists, and refuses what should be a text and is none: serde would show it.
pub(super) fn check_texts(file: &mut Table) -> Result<(), Error> {
    let texts = SETTINGS.iter().filter(|(.., kind)| matches!(kind, Kind::Text)).map(|(_, place, _)| *place);
    for place in texts.chain(FILE_ONLY) {
        let value = match place.split_once('.') {
            Some((section, member)) => match file.get_mut(section) {
                Some(Value::Table(section)) => section.get_mut(member),
                Some(_) => return Err(Error::NoTable(section)),
                None => None,
            },
            None => file.get_mut(place),
        };
        let Some(value) = value.filter(|value| !value.is_str()) else { continue };
        match plain(value).filter(|_| LISTS.contains(&place) && value.is_array()) {
            Some(list) => *value = Value::String(list),
            None => return Err(Error::NoText(place)),
        }
    }
    Ok(())
}

/// A value as the text that it stands for: of a list, its items separated by commas. A table stands for none.
fn plain(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Table(_) => None,
        Value::Array(items) => items.iter().map(plain).collect::<Option<Vec<_>>>().map(|items| items.join(",")),
        other => Some(other.to_string()),
    }
}

/// Properties by their whole names: unquoted, `security.protocol` is a table of its own to TOML.
pub(super) fn flatten(table: Table, before: &str, properties: &mut BTreeMap<String, String>) -> Result<(), Error> {
    for (name, value) in table {
        let name = format!("{before}{name}");
        match (plain(&value), value) {
            (Some(text), _) => drop(properties.insert(name, text)),
            (None, Value::Table(table)) => flatten(table, &format!("{name}."), properties)?,
            (None, _) => return Err(Error::NoText("a list of kafka.properties")),
        }
    }
    Ok(())
}
