//! The type of a setting: its names, its valid values, and the field of a module's settings that holds its value.

use std::fmt;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::error::Error;
use crate::{app, auth, broker, completion, http, kafka, notify, objects, policy, store, sweeper};

/// One setting: a row of the table.
pub(super) struct Setting {
    /// The environment variable.
    pub(super) variable: &'static str,
    /// The key in the TOML file, with the name of its table.
    pub(super) key: &'static str,
    /// The valid values.
    pub(super) kind: Kind,
    /// The field that holds the value. Before anything is set, it holds the default.
    pub(super) field: fn(&mut Draft) -> &mut dyn Field,
    /// Words for the default, if the field has no value of its own.
    pub(super) unset: &'static str,
    /// The effect of the setting, the behaviour at the limit, and the reason for the default.
    pub(super) doc: &'static str,
}

/// The valid values of a setting.
pub(super) enum Kind {
    Text,
    /// Text that no error and no log line may show.
    Secret,
    /// An IP address with a port.
    Address,
    /// The addresses of Kafka brokers, as librdkafka reads them.
    KafkaAddresses,
    /// The name of an S3 bucket. S3 stores have different rules, so it is checked only for what none of them allows.
    Bucket,
    /// Text without commas, any number of times.
    List,
    Flag,
    /// One of these words.
    Words(&'static [&'static str]),
    /// A whole number in this range, of this unit.
    Number(RangeInclusive<u64>, &'static str),
}

/// The settings while they are read. They begin with the defaults of all modules.
pub(super) struct Draft {
    pub(super) app: app::Settings,
    pub(super) raw: Raw,
}

/// Values from which members of [`app::Settings`] are built when all values are known.
#[derive(Default)]
pub(super) struct Raw {
    pub(super) trusted_proxies: Vec<String>,
    pub(super) certificate_file: Option<String>,
    pub(super) key_file: Option<String>,
    pub(super) public_key_file: Option<String>,
    pub(super) connections_per_address: Option<usize>,
    pub(super) tenant_long_polls: Option<usize>,
}

impl Default for Draft {
    fn default() -> Self {
        let app = app::Settings {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            public_url: None,
            cors_origins: Vec::new(),
            store: store::Settings::new(""),
            objects: objects::Settings::default(),
            kafka: kafka::Settings::default(),
            http: http::Settings::default(),
            auth: auth::Settings::default(),
            policy: policy::Settings::default(),
            broker: broker::Settings::default(),
            completion: completion::Settings::default(),
            sweeper: sweeper::Settings::default(),
            notify: notify::Settings::default(),
        };
        Self { app, raw: Raw::default() }
    }
}

/// A row of the table without its documentation.
pub(super) const fn row(
    variable: &'static str,
    key: &'static str,
    kind: Kind,
    field: fn(&mut Draft) -> &mut dyn Field,
) -> Setting {
    Setting { variable, key, kind, field, unset: "none", doc: "" }
}

impl Setting {
    pub(super) const fn unset(mut self, unset: &'static str) -> Self {
        self.unset = unset;
        self
    }

    pub(super) const fn doc(mut self, doc: &'static str) -> Self {
        self.doc = doc;
        self
    }

    /// Stores a value. `name` is the variable or the key that it comes from.
    pub(super) fn set(&self, draft: &mut Draft, name: &str, text: &str) -> Result<(), Error> {
        let valid = match &self.kind {
            Kind::Words(words) => words.contains(&text),
            Kind::Number(range, _) => text.parse().is_ok_and(|number| range.contains(&number)),
            Kind::KafkaAddresses => kafka::are_bootstrap_servers(text),
            // The ARN of an access point is a bucket name for S3 clients, and contains a slash.
            Kind::Bucket => {
                let is_valid = |c: char| !c.is_whitespace() && !c.is_control() && (c != '/' || text.starts_with("arn:"));
                !text.is_empty() && text.chars().all(is_valid)
            }
            Kind::Text | Kind::Secret | Kind::Address | Kind::List | Kind::Flag => true,
        };
        match valid && (self.field)(draft).set(text) {
            true => Ok(()),
            false => Err(Error::value(name, text, &self.kind)),
        }
    }

    /// The default; `None` if only words can describe it.
    pub(super) fn default_value(&self) -> Option<String> {
        (self.field)(&mut Draft::default()).get()
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text => f.write_str("text"),
            Self::Secret => f.write_str("text (secret)"),
            Self::Address => f.write_str("an IP address and a port, such as 127.0.0.1:8080"),
            Self::KafkaAddresses => f.write_str("HOST:PORT, or several separated by commas"),
            Self::Bucket => f.write_str("the name of a bucket, without spaces and slashes"),
            Self::List => f.write_str("a list, separated by commas"),
            Self::Flag => f.write_str("true or false"),
            Self::Words(words) => f.write_str(&words.join(" or ")),
            Self::Number(range, unit) => {
                write!(f, "a whole number, {} to {}{}{unit}", range.start(), range.end(), if unit.is_empty() { "" } else { " " })
            }
        }
    }
}

/// A field that holds the value of a setting.
pub(super) trait Field {
    /// Parses and stores a value. `false`: the value is not valid.
    fn set(&mut self, text: &str) -> bool;

    /// The value as text; `None` if there is none.
    fn get(&self) -> Option<String>;
}

/// Implements [`Field`] for types that parse and print themselves, and for an [`Option`] of each.
macro_rules! fields {
    ($($type:ty)*) => { $(
        impl Field for $type {
            fn set(&mut self, text: &str) -> bool {
                text.parse().map(|value| *self = value).is_ok()
            }

            fn get(&self) -> Option<String> {
                Some(self.to_string()).filter(|text| !text.is_empty())
            }
        }

        impl Field for Option<$type> {
            fn set(&mut self, text: &str) -> bool {
                text.parse().map(|value| *self = Some(value)).is_ok()
            }

            fn get(&self) -> Option<String> {
                self.as_ref().and_then(Field::get)
            }
        }
    )* };
}
fields!(bool u32 u64 usize i64 String SocketAddr);

impl Field for Duration {
    fn set(&mut self, text: &str) -> bool {
        text.parse().map(|seconds| *self = Self::from_secs(seconds)).is_ok()
    }

    fn get(&self) -> Option<String> {
        Some(self.as_secs().to_string())
    }
}

impl Field for Vec<String> {
    fn set(&mut self, text: &str) -> bool {
        *self = text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(str::to_owned).collect();
        true
    }

    fn get(&self) -> Option<String> {
        Some(self.join(",")).filter(|text| !text.is_empty())
    }
}

/// Implements [`Field`] for an enum. The names are those of `Kind::Words`.
macro_rules! words {
    ($type:ty: $($word:literal = $variant:ident),*) => {
        impl Field for $type {
            fn set(&mut self, text: &str) -> bool {
                match text {
                    $($word => *self = Self::$variant,)*
                    _ => return false,
                }
                true
            }

            fn get(&self) -> Option<String> {
                Some(match self { $(Self::$variant => $word,)* }.to_owned())
            }
        }
    };
}
words!(auth::Mode: "jwt" = Jwt, "none" = None);
words!(kafka::Delivery: "exactly_once" = ExactlyOnce, "at_least_once" = AtLeastOnce);
