//! Settings of `serve`: the environment over a TOML file over the defaults.
//!
//! Each room declares its own settings; this one knows their names outside. `LFS_BROKER_S3_BUCKET` in the
//! environment is `bucket` in the file's table `[s3]`. A variable whose name ends in `_FILE` names a file that holds
//! the value, for secrets that are mounted.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;
use toml::{Table, Value};

use crate::kafka::Delivery;
use crate::{app, auth, broker, finish, http, kafka, objects, policy, store, sweeper};

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("cannot read {0}: {1}")]
    File(String, std::io::Error),
    /// The file is not TOML, or holds what nobody asked for.
    #[error("settings: {0}")]
    Toml(#[from] toml::de::Error),
    /// A value of the environment is not of its kind.
    #[error("{name} is {value:?}, but must be {kind}")]
    Value {
        /// The variable.
        name: String,
        /// Its value.
        value: String,
        /// What it must be.
        kind: &'static str,
    },
    /// Something that has no default is missing.
    #[error("{0} is not set")]
    Missing(&'static str),
}

#[derive(Clone, Copy)]
enum Kind {
    Text,
    Number,
    Flag,
}

/// Every setting: its variable, its place in the file, its kind.
const SETTINGS: &[(&str, &str, Kind)] = &[
    ("LFS_BROKER_LISTEN", "listen", Kind::Text),
    ("LFS_BROKER_PUBLIC_URL", "public_url", Kind::Text),
    ("DATABASE_URL", "database_url", Kind::Text),
    ("KAFKA_BOOTSTRAP_SERVERS", "kafka.bootstrap_servers", Kind::Text),
    ("AWS_REGION", "s3.region", Kind::Text),
    ("LFS_BROKER_S3_BUCKET", "s3.bucket", Kind::Text),
    ("LFS_BROKER_S3_PUBLIC_ENDPOINT", "s3.public_endpoint", Kind::Text),
    ("LFS_BROKER_S3_FORCE_PATH_STYLE", "s3.force_path_style", Kind::Flag),
    ("LFS_BROKER_S3_SIGNING_ACCESS_KEY_ID", "s3.signing_access_key_id", Kind::Text),
    ("LFS_BROKER_S3_SIGNING_SECRET_ACCESS_KEY", "s3.signing_secret_access_key", Kind::Text),
    ("LFS_BROKER_S3_ALLOW_COPY_SOURCE", "s3.allow_copy_source", Kind::Flag),
    ("LFS_BROKER_AUTH_MODE", "auth.mode", Kind::Text),
    ("LFS_BROKER_JWT_HS256_SECRET", "jwt.hs256_secret", Kind::Text),
    ("LFS_BROKER_JWT_PUBLIC_KEY_FILE", "jwt.public_key_file", Kind::Text),
    ("LFS_BROKER_JWT_JWKS_URL", "jwt.jwks_url", Kind::Text),
    ("LFS_BROKER_JWT_ISSUER", "jwt.issuer", Kind::Text),
    ("LFS_BROKER_JWT_AUDIENCE", "jwt.audience", Kind::Text),
    ("LFS_BROKER_TOPICS_DEFAULT_ENABLED", "topics.default_enabled", Kind::Flag),
    ("LFS_BROKER_SINGLE_PUT_MAX_BYTES", "single_put_max_bytes", Kind::Number),
    ("LFS_BROKER_PART_SIZE_BYTES", "part_size_bytes", Kind::Number),
    ("LFS_BROKER_SESSION_SECONDS", "session_seconds", Kind::Number),
    ("LFS_BROKER_SESSION_MAX_SECONDS", "session_max_seconds", Kind::Number),
    ("LFS_BROKER_URL_SECONDS", "url_seconds", Kind::Number),
    ("LFS_BROKER_SWEEP_SECONDS", "sweep_seconds", Kind::Number),
    ("LFS_BROKER_LONGEST_PUT_SECONDS", "longest_put_seconds", Kind::Number),
    ("LFS_BROKER_LEASE_SECONDS", "lease_seconds", Kind::Number),
    ("LFS_BROKER_COMPLETE_WAIT_SECONDS", "complete_wait_seconds", Kind::Number),
    ("LFS_BROKER_DELIVERY", "delivery", Kind::Text),
    ("LFS_BROKER_CORS_ORIGINS", "cors.origins", Kind::Text),
    ("LFS_BROKER_TENANT_OPEN_SESSIONS", "tenant.open_sessions", Kind::Number),
    ("LFS_BROKER_TENANT_RESERVED_BYTES", "tenant.reserved_bytes", Kind::Number),
];

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct File {
    listen: Option<SocketAddr>,
    public_url: Option<String>,
    database_url: Option<String>,
    kafka: KafkaTable,
    s3: objects::Settings,
    auth: AuthTable,
    jwt: JwtTable,
    topics: TopicsTable,
    tenant: TenantTable,
    cors: CorsTable,
    single_put_max_bytes: Option<u64>,
    part_size_bytes: Option<u64>,
    session_seconds: Option<u64>,
    session_max_seconds: Option<u64>,
    url_seconds: Option<u64>,
    sweep_seconds: Option<u64>,
    longest_put_seconds: Option<u64>,
    lease_seconds: Option<u64>,
    complete_wait_seconds: Option<u64>,
    delivery: Option<DeliveryName>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct KafkaTable {
    bootstrap_servers: Option<String>,
    properties: BTreeMap<String, String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct AuthTable {
    mode: Option<ModeName>,
}

#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum ModeName {
    Jwt,
    None,
}

#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "snake_case")]
enum DeliveryName {
    ExactlyOnce,
    AtLeastOnce,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct JwtTable {
    hs256_secret: Option<String>,
    public_key_file: Option<String>,
    jwks_url: Option<String>,
    issuer: Option<String>,
    audience: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct TopicsTable {
    default_enabled: bool,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct TenantTable {
    open_sessions: Option<i64>,
    reserved_bytes: Option<i64>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct CorsTable {
    /// Separated by commas.
    origins: String,
}

/// Reads the settings of `serve`. `environment` gives a variable's value.
///
/// # Errors
/// Whatever is missing, unknown or of the wrong kind, with its name.
pub fn load(file: Option<&Path>, environment: impl Fn(&str) -> Option<String>) -> Result<app::Settings, Error> {
    settings(gather(file, environment)?)
}

/// Reads where the database is: all that `migrate` needs.
///
/// # Errors
/// As [`load`], but only the database must be named.
pub fn load_store(file: Option<&Path>, environment: impl Fn(&str) -> Option<String>) -> Result<store::Settings, Error> {
    Ok(store::Settings::new(&gather(file, environment)?.database_url.ok_or(Error::Missing("DATABASE_URL"))?))
}

/// Reads how tokens are checked: all that `token` needs.
///
/// # Errors
/// As [`load`], but nothing must be named.
pub fn load_auth(file: Option<&Path>, environment: impl Fn(&str) -> Option<String>) -> Result<auth::Settings, Error> {
    let file = gather(file, environment)?;
    auth_settings(file.auth, file.jwt)
}

fn gather(file: Option<&Path>, environment: impl Fn(&str) -> Option<String>) -> Result<File, Error> {
    let mut table = match file {
        Some(path) => read(&path.display().to_string())?.parse::<Table>()?,
        None => Table::new(),
    };
    for (name, place, kind) in SETTINGS {
        let from_file = |name: &str| environment(&format!("{name}_FILE")).map(|path| read(&path)).transpose();
        let value = match environment(name).filter(|value| !value.is_empty()) {
            Some(value) => Some(value),
            None => from_file(name)?.map(|text| text.trim_end_matches(['\r', '\n']).to_owned()),
        };
        if let Some(value) = value {
            put(&mut table, place, typed(name, value, *kind)?);
        }
    }
    Ok(table.try_into()?)
}

fn read(path: &str) -> Result<String, Error> {
    std::fs::read_to_string(path).map_err(|error| Error::File(path.to_owned(), error))
}

fn typed(name: &str, value: String, kind: Kind) -> Result<Value, Error> {
    let wrong = |value: &str, kind| Error::Value { name: name.to_owned(), value: value.to_owned(), kind };
    Ok(match kind {
        Kind::Text => Value::String(value),
        Kind::Number => match value.parse::<i64>() {
            Ok(number) if number >= 0 => Value::Integer(number),
            _ => return Err(wrong(&value, "a whole number, 0 or more")),
        },
        Kind::Flag => Value::Boolean(value.parse().map_err(|_| wrong(&value, "true or false"))?),
    })
}

fn put(table: &mut Table, place: &str, value: Value) {
    match place.split_once('.') {
        Some((section, member)) => {
            let section = table.entry(section).or_insert_with(|| Value::Table(Table::new()));
            if let Value::Table(section) = section {
                section.insert(member.to_owned(), value);
            }
        }
        None => {
            table.insert(place.to_owned(), value);
        }
    }
}

fn at_least(name: &str, seconds: Option<u64>, least: u64, default: Duration) -> Result<Duration, Error> {
    match seconds {
        None => Ok(default),
        Some(seconds) if seconds >= least => Ok(Duration::from_secs(seconds)),
        Some(seconds) => {
            let kind = if least == 1 { "at least 1" } else { "at least 3: a lease is renewed every third of it" };
            Err(Error::Value { name: name.to_owned(), value: seconds.to_string(), kind })
        }
    }
}

fn settings(file: File) -> Result<app::Settings, Error> {
    let (policies, sweeps, leases, patience) =
        (policy::Settings::default(), sweeper::Settings::default(), finish::Settings::default(), broker::Settings::default());
    let seconds = |name, seconds, default| at_least(name, seconds, 1, Duration::from_secs(default)).map(|d| d.as_secs());
    Ok(app::Settings {
        listen: file.listen.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 8080))),
        public_url: file.public_url,
        cors_origins: file
            .cors
            .origins
            .split(',')
            .map(|origin| origin.trim().to_owned())
            .filter(|origin| !origin.is_empty())
            .collect(),
        store: store::Settings::new(&file.database_url.ok_or(Error::Missing("DATABASE_URL"))?),
        objects: file.s3,
        kafka: kafka_settings(file.kafka, file.delivery)?,
        http: http::Settings::default(),
        auth: auth_settings(file.auth, file.jwt)?,
        policy: policy::Settings {
            default_enabled: file.topics.default_enabled,
            single_put_max_bytes: file.single_put_max_bytes.unwrap_or(policies.single_put_max_bytes),
            part_size_bytes: file.part_size_bytes.unwrap_or(policies.part_size_bytes),
            session_seconds: seconds("LFS_BROKER_SESSION_SECONDS", file.session_seconds, policies.session_seconds)?,
            session_max_seconds: seconds(
                "LFS_BROKER_SESSION_MAX_SECONDS",
                file.session_max_seconds,
                policies.session_max_seconds,
            )?,
            url_seconds: seconds("LFS_BROKER_URL_SECONDS", file.url_seconds, policies.url_seconds)?,
        },
        broker: broker::Settings {
            complete_wait: file.complete_wait_seconds.map_or(patience.complete_wait, Duration::from_secs),
            quota: store::Quota {
                open_sessions: file.tenant.open_sessions.unwrap_or(patience.quota.open_sessions),
                reserved_bytes: file.tenant.reserved_bytes.unwrap_or(patience.quota.reserved_bytes),
            },
        },
        finish: finish::Settings { lease: at_least("LFS_BROKER_LEASE_SECONDS", file.lease_seconds, 3, leases.lease)? },
        sweeper: sweeper::Settings {
            every: at_least("LFS_BROKER_SWEEP_SECONDS", file.sweep_seconds, 1, sweeps.every)?,
            longest_put: file.longest_put_seconds.map_or(sweeps.longest_put, Duration::from_secs),
        },
    })
}

fn kafka_settings(table: KafkaTable, delivery: Option<DeliveryName>) -> Result<kafka::Settings, Error> {
    Ok(kafka::Settings {
        bootstrap_servers: table.bootstrap_servers.ok_or(Error::Missing("KAFKA_BOOTSTRAP_SERVERS"))?,
        properties: table.properties,
        delivery: match delivery {
            None | Some(DeliveryName::ExactlyOnce) => Delivery::ExactlyOnce,
            Some(DeliveryName::AtLeastOnce) => Delivery::AtLeastOnce,
        },
        create_topics: false,
    })
}

fn auth_settings(auth: AuthTable, jwt: JwtTable) -> Result<auth::Settings, Error> {
    Ok(auth::Settings {
        mode: match auth.mode {
            None | Some(ModeName::Jwt) => auth::Mode::Jwt,
            Some(ModeName::None) => auth::Mode::None,
        },
        hs256_secret: jwt.hs256_secret,
        public_key_pem: jwt.public_key_file.as_deref().map(read).transpose()?,
        jwks_url: jwt.jwks_url,
        issuer: jwt.issuer,
        audience: jwt.audience,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(pairs: &[(&str, &str)]) -> Result<app::Settings, Error> {
        let pairs: BTreeMap<String, String> =
            pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        load(None, |name| pairs.get(name).cloned())
    }

    const NEEDED: [(&str, &str); 2] = [("DATABASE_URL", "postgres://x/y"), ("KAFKA_BOOTSTRAP_SERVERS", "k:9092")];

    #[test]
    fn defaults_are_those_of_the_contract() {
        let settings = with(&NEEDED).unwrap();
        assert_eq!(settings.listen.to_string(), "127.0.0.1:8080");
        assert_eq!(settings.auth.mode, auth::Mode::Jwt);
        assert!(!settings.policy.default_enabled);
        assert_eq!((settings.policy.single_put_max_bytes, settings.policy.part_size_bytes), (64 << 20, 16 << 20));
        assert_eq!(settings.broker.complete_wait.as_secs(), 5);
        assert_eq!(settings.kafka.delivery, Delivery::ExactlyOnce);
    }

    #[test]
    fn the_environment_wins_over_the_file_and_mistakes_are_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(
            file.path(),
            "listen = '127.0.0.1:1'\n[s3]\nbucket = 'file'\n[kafka.properties]\n'security.protocol' = 'ssl'\n",
        )
        .unwrap();
        let environment = |name: &str| match name {
            "LFS_BROKER_S3_BUCKET" => Some("environment".to_owned()),
            _ => NEEDED.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()),
        };
        let settings = load(Some(file.path()), environment).unwrap();
        assert_eq!(settings.objects.bucket.as_deref(), Some("environment"));
        assert_eq!(settings.listen.port(), 1);
        assert_eq!(settings.kafka.properties["security.protocol"], "ssl");

        std::fs::write(file.path(), "lisen = 'x'\n").unwrap();
        assert!(load(Some(file.path()), environment).err().unwrap().to_string().contains("lisen"));
        let told = |extra: (&str, &str)| with(&[NEEDED[0], NEEDED[1], extra]).err().unwrap().to_string();
        assert!(told(("LFS_BROKER_URL_SECONDS", "0")).contains("LFS_BROKER_URL_SECONDS"));
        assert!(told(("LFS_BROKER_LEASE_SECONDS", "x")).contains("LFS_BROKER_LEASE_SECONDS"));
        assert!(told(("LFS_BROKER_AUTH_MODE", "maybe")).contains("maybe"));
        assert!(with(&[]).err().unwrap().to_string().contains("DATABASE_URL"));
    }

    #[test]
    fn a_secret_may_come_from_a_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "from a file\n").unwrap();
        let path = file.path().display().to_string();
        let settings = with(&[NEEDED[0], NEEDED[1], ("LFS_BROKER_JWT_HS256_SECRET_FILE", &path)]).unwrap();
        assert_eq!(settings.auth.hs256_secret.as_deref(), Some("from a file"));
    }
}
