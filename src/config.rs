//! Settings of `serve`: the environment overrides the TOML file, and the file overrides the defaults.
//!
//! Each module declares its own settings; this module maps them to environment variables and TOML keys. For example,
//! `LFS_BROKER_S3_BUCKET` is `bucket` in the file's table `[s3]`. A variable with the suffix `_FILE` names a file that holds
//! the value, for mounted secrets.

mod file;
mod urls;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use serde::Deserialize;
use toml::{Table, Value};

use crate::kafka::Delivery;
use crate::{app, auth, broker, completion, http, kafka, objects, policy, session, store, sweeper};
pub(crate) use urls::parse_origin;
use urls::{public_url, url_host};

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
        /// What is wrong with the line.
        reason: String,
    },
    /// A setting of the file is unknown or has an invalid value.
    #[error("settings: {0}")]
    Unknown(String),
    /// A value that must be a string has another type. The error does not show the value, because it may be a secret.
    #[error("{0} must be a string in quotes")]
    NotAString(&'static str),
    /// A value that must be a table has another type.
    #[error("{0} must be a table, [{0}]")]
    NotATable(&'static str),
    /// A value is not valid.
    #[error("{name} is {value:?}, but must be {expected}")]
    Value {
        /// The environment variable.
        name: String,
        /// Its value.
        value: String,
        /// The valid values.
        expected: &'static str,
    },
    /// No browser sends this origin.
    #[error("LFS_BROKER_CORS_ORIGINS: {value:?} never matches: {hint}")]
    Origin {
        /// The configured origin.
        value: String,
        /// What to write instead.
        hint: String,
    },
    /// A required setting is missing.
    #[error("{0} is not set")]
    Missing(&'static str),
}

#[derive(Clone, Copy)]
enum ValueKind {
    Text,
    Number,
    Flag,
}

/// Every setting: its environment variable, its path in the TOML file, and its type.
const SETTINGS: &[(&str, &str, ValueKind)] = &[
    ("LFS_BROKER_LISTEN", "listen", ValueKind::Text),
    ("LFS_BROKER_PUBLIC_URL", "public_url", ValueKind::Text),
    ("LFS_BROKER_TLS_CERTIFICATE_FILE", "tls.certificate_file", ValueKind::Text),
    ("LFS_BROKER_TLS_KEY_FILE", "tls.key_file", ValueKind::Text),
    ("LFS_BROKER_TRUSTED_PROXIES", "trusted_proxies", ValueKind::Text),
    ("LFS_BROKER_CONNECTIONS", "connections", ValueKind::Number),
    ("LFS_BROKER_CONNECTIONS_PER_ADDRESS", "connections_per_address", ValueKind::Number),
    ("LFS_BROKER_BODY_MEMORY_BYTES", "body_memory_bytes", ValueKind::Number),
    ("LFS_BROKER_SHUTDOWN_DELAY_SECONDS", "shutdown_delay_seconds", ValueKind::Number),
    ("LFS_BROKER_SHUTDOWN_GRACE_SECONDS", "shutdown_grace_seconds", ValueKind::Number),
    ("LFS_BROKER_TENANT_LONG_POLLS", "tenant.long_polls", ValueKind::Number),
    ("LFS_BROKER_HEADER_SECONDS", "header_seconds", ValueKind::Number),
    ("LFS_BROKER_BODY_SECONDS", "body_seconds", ValueKind::Number),
    ("LFS_BROKER_REQUEST_SECONDS", "request_seconds", ValueKind::Number),
    ("LFS_BROKER_IDLE_SECONDS", "idle_seconds", ValueKind::Number),
    ("LFS_BROKER_FAILED_LOGINS_PER_MINUTE", "failed_logins_per_minute", ValueKind::Number),
    ("LFS_BROKER_CONCURRENT_COMPLETES", "concurrent_completes", ValueKind::Number),
    ("LFS_BROKER_TENANT_REQUESTS_PER_SECOND", "tenant.requests_per_second", ValueKind::Number),
    ("DATABASE_URL", "database_url", ValueKind::Text),
    ("KAFKA_BOOTSTRAP_SERVERS", "kafka.bootstrap_servers", ValueKind::Text),
    ("AWS_REGION", "s3.region", ValueKind::Text),
    ("LFS_BROKER_S3_BUCKET", "s3.bucket", ValueKind::Text),
    ("LFS_BROKER_S3_PUBLIC_ENDPOINT", "s3.public_endpoint", ValueKind::Text),
    ("LFS_BROKER_S3_FORCE_PATH_STYLE", "s3.force_path_style", ValueKind::Flag),
    ("LFS_BROKER_S3_SIGNING_ACCESS_KEY_ID", "s3.signing_access_key_id", ValueKind::Text),
    ("LFS_BROKER_S3_SIGNING_SECRET_ACCESS_KEY", "s3.signing_secret_access_key", ValueKind::Text),
    ("LFS_BROKER_S3_ALLOW_COPY_SOURCE", "s3.allow_copy_source", ValueKind::Flag),
    ("LFS_BROKER_AUTH_MODE", "auth.mode", ValueKind::Text),
    ("LFS_BROKER_JWT_HS256_SECRET", "jwt.hs256_secret", ValueKind::Text),
    ("LFS_BROKER_JWT_PUBLIC_KEY_FILE", "jwt.public_key_file", ValueKind::Text),
    ("LFS_BROKER_JWT_JWKS_URL", "jwt.jwks_url", ValueKind::Text),
    ("LFS_BROKER_JWT_ISSUER", "jwt.issuer", ValueKind::Text),
    ("LFS_BROKER_JWT_AUDIENCE", "jwt.audience", ValueKind::Text),
    ("LFS_BROKER_TOPICS_DEFAULT_ENABLED", "topics.default_enabled", ValueKind::Flag),
    ("LFS_BROKER_SINGLE_PUT_MAX_BYTES", "single_put_max_bytes", ValueKind::Number),
    ("LFS_BROKER_PART_SIZE_BYTES", "part_size_bytes", ValueKind::Number),
    ("LFS_BROKER_SESSION_SECONDS", "session_seconds", ValueKind::Number),
    ("LFS_BROKER_SESSION_MAX_SECONDS", "session_max_seconds", ValueKind::Number),
    ("LFS_BROKER_URL_SECONDS", "url_seconds", ValueKind::Number),
    ("LFS_BROKER_SWEEP_SECONDS", "sweep_seconds", ValueKind::Number),
    ("LFS_BROKER_LONGEST_PUT_SECONDS", "longest_put_seconds", ValueKind::Number),
    ("LFS_BROKER_LEASE_SECONDS", "lease_seconds", ValueKind::Number),
    ("LFS_BROKER_COMPLETE_WAIT_SECONDS", "complete_wait_seconds", ValueKind::Number),
    ("LFS_BROKER_DELIVERY", "delivery", ValueKind::Text),
    ("LFS_BROKER_CORS_ORIGINS", "cors.origins", ValueKind::Text),
    ("LFS_BROKER_TENANT_OPEN_SESSIONS", "tenant.open_sessions", ValueKind::Number),
    ("LFS_BROKER_TENANT_RESERVED_BYTES", "tenant.reserved_bytes", ValueKind::Number),
    ("LFS_BROKER_TENANT_CONNECTIONS", "tenant.connections", ValueKind::Number),
];

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct SettingsFile {
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
    tls: TlsTable,
    /// Comma-separated.
    trusted_proxies: String,
    connections: Option<usize>,
    connections_per_address: Option<usize>,
    body_memory_bytes: Option<usize>,
    shutdown_delay_seconds: Option<u64>,
    shutdown_grace_seconds: Option<u64>,
    header_seconds: Option<u64>,
    body_seconds: Option<u64>,
    request_seconds: Option<u64>,
    idle_seconds: Option<u64>,
    failed_logins_per_minute: Option<u32>,
    concurrent_completes: Option<usize>,
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
    properties: Table,
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
    requests_per_second: Option<u32>,
    connections: Option<u32>,
    long_polls: Option<usize>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct TlsTable {
    certificate_file: Option<PathBuf>,
    key_file: Option<PathBuf>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct CorsTable {
    /// Comma-separated.
    origins: String,
}

/// Loads the settings of `serve`. `environment` returns the value of a variable.
///
/// # Errors
/// If a setting is missing, unknown or not valid. The error names the setting.
pub fn load(file: Option<&Path>, environment: impl Fn(&str) -> Option<String>) -> Result<app::Settings, Error> {
    settings(merge_sources(file, environment)?)
}

/// Loads the database settings, which is all that `migrate` needs.
///
/// # Errors
/// As [`load`], but only the database URL is required.
pub fn load_store(file: Option<&Path>, environment: impl Fn(&str) -> Option<String>) -> Result<store::Settings, Error> {
    Ok(store::Settings::new(&merge_sources(file, environment)?.database_url.ok_or(Error::Missing("DATABASE_URL"))?))
}

/// Loads the authentication settings, which is all that `token` needs.
///
/// # Errors
/// As [`load`], but no setting is required.
pub fn load_auth(file: Option<&Path>, environment: impl Fn(&str) -> Option<String>) -> Result<auth::Settings, Error> {
    let file = merge_sources(file, environment)?;
    auth_settings(file.auth, file.jwt)
}

/// Loads the Kafka settings, which is all that `consume` needs.
///
/// # Errors
/// As [`load`], but only the bootstrap servers are required.
pub fn load_kafka(file: Option<&Path>, environment: impl Fn(&str) -> Option<String>) -> Result<kafka::Settings, Error> {
    let file = merge_sources(file, environment)?;
    kafka_settings(file.kafka, file.delivery)
}

/// Loads the S3 settings, which is all that following references needs.
///
/// # Errors
/// As [`load`], but no setting is required.
pub fn load_objects(file: Option<&Path>, environment: impl Fn(&str) -> Option<String>) -> Result<objects::Settings, Error> {
    Ok(merge_sources(file, environment)?.s3)
}

fn merge_sources(file: Option<&Path>, environment: impl Fn(&str) -> Option<String>) -> Result<SettingsFile, Error> {
    let mut table = match file {
        Some(path) => file::parse(&path.display().to_string())?,
        None => Table::new(),
    };
    file::check_strings(&mut table)?;
    for (name, toml_path, value_kind) in SETTINGS {
        let from_file = |name: &str| environment(&format!("{name}_FILE")).map(|path| read(&path)).transpose();
        let value = match environment(name).filter(|value| !value.is_empty()) {
            Some(value) => Some(value),
            None => from_file(name)?.map(|text| text.trim_end_matches(['\r', '\n']).to_owned()),
        };
        if let Some(value) = value {
            insert_at(&mut table, toml_path, parse_value(name, value, *value_kind)?);
        }
    }
    table.try_into().map_err(|error: toml::de::Error| Error::Unknown(error.to_string().trim().replace('\n', " ")))
}

fn read(path: &str) -> Result<String, Error> {
    std::fs::read_to_string(path).map_err(|error| Error::File(path.to_owned(), error))
}

fn parse_value(name: &str, value: String, value_kind: ValueKind) -> Result<Value, Error> {
    let invalid = |value: &str, expected| Error::Value { name: name.to_owned(), value: value.to_owned(), expected };
    Ok(match value_kind {
        ValueKind::Text => Value::String(value),
        ValueKind::Number => match value.parse::<i64>() {
            Ok(number) if number >= 0 => Value::Integer(number),
            _ => return Err(invalid(&value, "a whole number, 0 or more")),
        },
        ValueKind::Flag => Value::Boolean(value.parse().map_err(|_| invalid(&value, "true or false"))?),
    })
}

fn insert_at(table: &mut Table, toml_path: &str, value: Value) {
    match toml_path.split_once('.') {
        Some((section, key)) => {
            let section = table.entry(section).or_insert_with(|| Value::Table(Table::new()));
            if let Value::Table(section) = section {
                section.insert(key.to_owned(), value);
            }
        }
        None => {
            table.insert(toml_path.to_owned(), value);
        }
    }
}

fn seconds_at_least(name: &str, seconds: Option<u64>, minimum: u64, default: Duration) -> Result<Duration, Error> {
    match seconds {
        None => Ok(default),
        Some(seconds) if seconds >= minimum => Ok(Duration::from_secs(seconds)),
        Some(seconds) => {
            let expected = if minimum == 1 { "at least 1" } else { "at least 3: a lease is renewed after a third of its time" };
            Err(Error::Value { name: name.to_owned(), value: seconds.to_string(), expected })
        }
    }
}

fn settings(file: SettingsFile) -> Result<app::Settings, Error> {
    let (sweeper_defaults, completion_defaults, broker_defaults) =
        (sweeper::Settings::default(), completion::Settings::default(), broker::Settings::default());
    let cors_origins: Vec<String> = comma_separated(&file.cors.origins).map(parse_origin).collect::<Result<_, _>>()?;
    let allowed_hosts = matches!(file.auth.mode, Some(ModeName::None)).then(|| http::AllowedHosts {
        hosts: file.public_url.as_deref().and_then(url_host).into_iter().collect(),
        origins: cors_origins.clone(),
    });
    Ok(app::Settings {
        listen: file.listen.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 8080))),
        public_url: public_url(file.public_url.clone())?,
        cors_origins,
        http: http::Settings { allowed_hosts, ..http_settings(&file)? },
        policy: policy_settings(&file)?,
        store: store_settings(file.database_url, file.tenant.connections)?,
        objects: file.s3,
        kafka: kafka_settings(file.kafka, file.delivery)?,
        auth: auth_settings(file.auth, file.jwt)?,
        broker: broker::Settings {
            complete_wait: file.complete_wait_seconds.map_or(broker_defaults.complete_wait, Duration::from_secs),
            max_concurrent_completes: at_least_one(
                "LFS_BROKER_CONCURRENT_COMPLETES",
                file.concurrent_completes,
                broker_defaults.max_concurrent_completes,
            )?,
            quota: store::Quota {
                open_sessions: file.tenant.open_sessions.unwrap_or(broker_defaults.quota.open_sessions),
                reserved_bytes: file.tenant.reserved_bytes.unwrap_or(broker_defaults.quota.reserved_bytes),
            },
        },
        completion: completion::Settings {
            lease: seconds_at_least("LFS_BROKER_LEASE_SECONDS", file.lease_seconds, 3, completion_defaults.lease)?,
        },
        sweeper: sweeper::Settings {
            interval: seconds_at_least("LFS_BROKER_SWEEP_SECONDS", file.sweep_seconds, 1, sweeper_defaults.interval)?,
            max_put_duration: file.longest_put_seconds.map_or(sweeper_defaults.max_put_duration, Duration::from_secs),
        },
    })
}

fn store_settings(url: Option<String>, tenant_connections: Option<u32>) -> Result<store::Settings, Error> {
    let defaults = store::Settings::new(&url.ok_or(Error::Missing("DATABASE_URL"))?);
    Ok(store::Settings { tenant_connections: tenant_connections.unwrap_or(defaults.tenant_connections), ..defaults })
}

fn policy_settings(file: &SettingsFile) -> Result<policy::Settings, Error> {
    let defaults = policy::Settings::default();
    let within = |name, number: Option<u64>, default, bounds: RangeInclusive<u64>, expected| match number {
        Some(number) if !bounds.contains(&number) => Err(invalid(name, &number.to_string(), expected)),
        number => Ok(number.unwrap_or(default)),
    };
    let week =
        |name, seconds, default| within(name, seconds, default, 1..=policy::MAX_LIFETIME_SECONDS, "1 to 604800, which is a week");
    Ok(policy::Settings {
        default_enabled: file.topics.default_enabled,
        single_put_max_bytes: within(
            "LFS_BROKER_SINGLE_PUT_MAX_BYTES",
            file.single_put_max_bytes,
            defaults.single_put_max_bytes,
            0..=session::MAX_PUT_BYTES,
            "at most 5368709120: S3 takes 5 GiB in a PUT",
        )?,
        part_size_bytes: within(
            "LFS_BROKER_PART_SIZE_BYTES",
            file.part_size_bytes,
            defaults.part_size_bytes,
            session::MIN_PART_BYTES..=session::MAX_PART_BYTES,
            "5242880 to 5368709120: S3 takes parts of 5 MiB to 5 GiB",
        )?,
        session_seconds: week("LFS_BROKER_SESSION_SECONDS", file.session_seconds, defaults.session_seconds)?,
        session_max_seconds: week("LFS_BROKER_SESSION_MAX_SECONDS", file.session_max_seconds, defaults.session_max_seconds)?,
        url_seconds: week("LFS_BROKER_URL_SECONDS", file.url_seconds, defaults.url_seconds)?,
    })
}

/// The items of a comma-separated list.
fn comma_separated(list: &str) -> impl Iterator<Item = &str> {
    list.split(',').map(str::trim).filter(|item| !item.is_empty())
}

fn at_least_one(name: &str, number: Option<usize>, default: usize) -> Result<usize, Error> {
    match number {
        Some(0) => Err(invalid(name, "0", "at least 1")),
        number => Ok(number.unwrap_or(default)),
    }
}

fn invalid(name: &str, value: &str, expected: &'static str) -> Error {
    Error::Value { name: name.to_owned(), value: value.to_owned(), expected }
}

/// The request timeout, which must be longer than a request may wait for a change or for Kafka.
fn request_timeout(file: &SettingsFile, default: Duration) -> Result<Duration, Error> {
    let seconds = file.request_seconds.unwrap_or(default.as_secs());
    let longest_wait = broker::MAX_WAIT_SECONDS.max(file.complete_wait_seconds.unwrap_or_default());
    if seconds > longest_wait {
        return Ok(Duration::from_secs(seconds));
    }
    let expected = "more than LFS_BROKER_COMPLETE_WAIT_SECONDS, and more than 30, the longest wait of a read";
    Err(invalid("LFS_BROKER_REQUEST_SECONDS", &seconds.to_string(), expected))
}

fn http_settings(file: &SettingsFile) -> Result<http::Settings, Error> {
    let defaults = http::Settings::default();
    let tls = match (&file.tls.certificate_file, &file.tls.key_file) {
        (None, None) => None,
        (Some(certificate), Some(key)) => Some(http::tls::Settings::new(certificate, key)),
        (Some(_), None) => return Err(Error::Missing("LFS_BROKER_TLS_KEY_FILE")),
        (None, Some(_)) => return Err(Error::Missing("LFS_BROKER_TLS_CERTIFICATE_FILE")),
    };
    let proxy = |text: &str| match text.parse::<IpAddr>() {
        Ok(address) => Ok(IpNet::from(address)),
        Err(_) => text.parse::<IpNet>().map_err(|_| {
            invalid("LFS_BROKER_TRUSTED_PROXIES", text, "IP addresses and networks such as 10.0.0.0/8, separated by commas")
        }),
    };
    let connections = at_least_one("LFS_BROKER_CONNECTIONS", file.connections, defaults.connections)?;
    Ok(http::Settings {
        header_timeout: seconds_at_least("LFS_BROKER_HEADER_SECONDS", file.header_seconds, 1, defaults.header_timeout)?,
        body_timeout: seconds_at_least("LFS_BROKER_BODY_SECONDS", file.body_seconds, 1, defaults.body_timeout)?,
        request_timeout: request_timeout(file, defaults.request_timeout)?,
        idle_timeout: seconds_at_least("LFS_BROKER_IDLE_SECONDS", file.idle_seconds, 1, defaults.idle_timeout)?,
        connections,
        // The defaults are shares of the configured number of connections.
        connections_per_address: file.connections_per_address.unwrap_or((connections / 2).max(1)),
        tenant_long_polls: file.tenant.long_polls.unwrap_or((connections / 4).max(1)),
        body_memory_bytes: match file.body_memory_bytes {
            Some(bytes) if !http::BODY_MEMORY.contains(&bytes) => {
                let expected = "1048576 to 1099511627776: one request with part hashes has up to 1 MiB";
                return Err(invalid("LFS_BROKER_BODY_MEMORY_BYTES", &bytes.to_string(), expected));
            }
            bytes => bytes.unwrap_or(defaults.body_memory_bytes),
        },
        shutdown_delay: file.shutdown_delay_seconds.map_or(defaults.shutdown_delay, Duration::from_secs),
        shutdown_grace: file.shutdown_grace_seconds.map_or(defaults.shutdown_grace, Duration::from_secs),
        tls,
        trusted_proxies: comma_separated(&file.trusted_proxies).map(proxy).collect::<Result<_, _>>()?,
        tenant_requests_per_second: file.tenant.requests_per_second.unwrap_or(defaults.tenant_requests_per_second),
        failed_logins_per_minute: file.failed_logins_per_minute.unwrap_or(defaults.failed_logins_per_minute),
        ..defaults
    })
}

fn kafka_settings(table: KafkaTable, delivery: Option<DeliveryName>) -> Result<kafka::Settings, Error> {
    let mut properties = BTreeMap::new();
    file::flatten(table.properties, "", &mut properties)?;
    Ok(kafka::Settings {
        bootstrap_servers: table.bootstrap_servers.ok_or(Error::Missing("KAFKA_BOOTSTRAP_SERVERS"))?,
        properties,
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
#[path = "config_tests.rs"]
mod tests;
