//! Why the settings cannot be used.

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("cannot read {0}: {1}")]
    File(String, std::io::Error),
    /// The file is not valid TOML. The error does not show the line, because it may hold a secret.
    #[error("{path}, line {line}: {reason}")]
    Toml {
        /// The file.
        path: String,
        /// The line number, from 1.
        line: usize,
        /// The error in the line.
        reason: String,
    },
    /// Variables or keys that are no settings, each with the nearest known name.
    #[error("{}", .0.join("; "))]
    Unknown(Vec<String>),
    /// A value of the file has the wrong type. The error does not show the value, because it may be a secret.
    #[error("{key} must be {expected}")]
    Type {
        /// The key in the file.
        key: String,
        /// The valid types.
        expected: String,
    },
    /// A value is not valid.
    #[error("{name} is {value:?}, but must be {expected}")]
    Value {
        /// The environment variable, or the key in the file.
        name: String,
        /// Its value.
        value: String,
        /// The valid values.
        expected: String,
    },
    /// No browser sends this origin.
    #[error("LFS_BROKER_CORS_ORIGINS: {value:?} never matches: {hint}")]
    Origin {
        /// The configured origin.
        value: String,
        /// The text to write instead.
        hint: String,
    },
    /// Required settings are missing.
    #[error("{}", missing(.0))]
    Missing(Vec<&'static str>),
}

fn missing(names: &[&str]) -> String {
    names.iter().map(|name| format!("{name} is not set")).collect::<Vec<_>>().join("; ")
}

impl Error {
    pub(super) fn value(name: &str, value: &str, expected: impl ToString) -> Self {
        Self::Value { name: name.to_owned(), value: value.to_owned(), expected: expected.to_string() }
    }
}
