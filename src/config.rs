//! Settings of `serve`: the environment over a TOML file over the defaults.
//!
//! Each room declares its own settings; this one knows their names outside. `LFS_BROKER_S3_BUCKET` in the
//! environment is `bucket` in the file's table `[s3]`. A variable whose name ends in `_FILE` names a file that holds
//! the value, for secrets that are mounted.

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
use crate::{app, auth, broker, finish, http, kafka, objects, policy, session, store, sweeper};
pub(crate) use urls::origin;
use urls::{host, public_url};

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("cannot read {0}: {1}")]
    File(String, std::io::Error),
    /// The file is not TOML. Its line is not shown: it may hold a secret.
    #[error("{path}, line {line}: {reason}")]
    Toml {
        /// The file.
        path: String,
        /// The line, from 1 on.
        line: usize,
        /// What is wrong there.
        reason: String,
    },
    /// The settings hold what nobody asked for.
    #[error("settings: {0}")]
    Unknown(String),
    /// A text of the file is something else, which is not shown: it may be a secret.
    #[error("{0} must be a text in quotes")]
    NoText(&'static str),
    /// The same where a table should be.
    #[error("{0} must be a table, [{0}]")]
    NoTable(&'static str),
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
    /// No browser sends such an origin.
    #[error("LFS_BROKER_CORS_ORIGINS: {value:?} never matches: {hint}")]
    Origin {
        /// What was set.
        value: String,
        /// What to set.
        hint: String,
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
    ("LFS_BROKER_TLS_CERTIFICATE_FILE", "tls.certificate_file", Kind::Text),
    ("LFS_BROKER_TLS_KEY_FILE", "tls.key_file", Kind::Text),
    ("LFS_BROKER_TRUSTED_PROXIES", "trusted_proxies", Kind::Text),
    ("LFS_BROKER_CONNECTIONS", "connections", Kind::Number),
    ("LFS_BROKER_CONNECTIONS_PER_ADDRESS", "connections_per_address", Kind::Number),
    ("LFS_BROKER_BODY_MEMORY_BYTES", "body_memory_bytes", Kind::Number),
    ("LFS_BROKER_SHUTDOWN_DELAY_SECONDS", "shutdown_delay_seconds", Kind::Number),
    ("LFS_BROKER_SHUTDOWN_GRACE_SECONDS", "shutdown_grace_seconds", Kind::Number),
    ("LFS_BROKER_TENANT_LONG_POLLS", "tenant.long_polls", Kind::Number),
    ("LFS_BROKER_HEADER_SECONDS", "header_seconds", Kind::Number),
    ("LFS_BROKER_BODY_SECONDS", "body_seconds", Kind::Number),
    ("LFS_BROKER_REQUEST_SECONDS", "request_seconds", Kind::Number),
    ("LFS_BROKER_IDLE_SECONDS", "idle_seconds", Kind::Number),
    ("LFS_BROKER_FAILED_LOGINS_PER_MINUTE", "failed_logins_per_minute", Kind::Number),
    ("LFS_BROKER_CONCURRENT_COMPLETES", "concurrent_completes", Kind::Number),
    ("LFS_BROKER_TENANT_REQUESTS_PER_SECOND", "tenant.requests_per_second", Kind::Number),
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
    ("LFS_BROKER_TENANT_CONNECTIONS", "tenant.connections", Kind::Number),
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
    tls: TlsTable,
    /// Separated by commas.
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

/// Reads where Kafka is: all that `consume` needs.
///
/// # Errors
/// As [`load`], but only Kafka must be named.
pub fn load_kafka(file: Option<&Path>, environment: impl Fn(&str) -> Option<String>) -> Result<kafka::Settings, Error> {
    let file = gather(file, environment)?;
    kafka_settings(file.kafka, file.delivery)
}

/// Reads where the objects are: all that following references needs.
///
/// # Errors
/// As [`load`], but nothing must be named.
pub fn load_objects(file: Option<&Path>, environment: impl Fn(&str) -> Option<String>) -> Result<objects::Settings, Error> {
    Ok(gather(file, environment)?.s3)
}

fn gather(file: Option<&Path>, environment: impl Fn(&str) -> Option<String>) -> Result<File, Error> {
    let mut table = match file {
        Some(path) => file::parse(&path.display().to_string())?,
        None => Table::new(),
    };
    file::check_texts(&mut table)?;
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
    table.try_into().map_err(|error: toml::de::Error| Error::Unknown(error.to_string().trim().replace('\n', " ")))
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
    let (sweeps, leases, patience) = (sweeper::Settings::default(), finish::Settings::default(), broker::Settings::default());
    let cors_origins: Vec<String> = listed(&file.cors.origins).map(origin).collect::<Result<_, _>>()?;
    let local = matches!(file.auth.mode, Some(ModeName::None)).then(|| http::Local {
        hosts: file.public_url.as_deref().and_then(host).into_iter().collect(),
        origins: cors_origins.clone(),
    });
    Ok(app::Settings {
        listen: file.listen.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 8080))),
        public_url: public_url(file.public_url.clone())?,
        cors_origins,
        http: http::Settings { local, ..http_settings(&file)? },
        policy: policy_settings(&file)?,
        store: store_settings(file.database_url, file.tenant.connections)?,
        objects: file.s3,
        kafka: kafka_settings(file.kafka, file.delivery)?,
        auth: auth_settings(file.auth, file.jwt)?,
        broker: broker::Settings {
            complete_wait: file.complete_wait_seconds.map_or(patience.complete_wait, Duration::from_secs),
            completes: least_one("LFS_BROKER_CONCURRENT_COMPLETES", file.concurrent_completes, patience.completes)?,
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

fn store_settings(url: Option<String>, tenant_connections: Option<u32>) -> Result<store::Settings, Error> {
    let defaults = store::Settings::new(&url.ok_or(Error::Missing("DATABASE_URL"))?);
    Ok(store::Settings { tenant_connections: tenant_connections.unwrap_or(defaults.tenant_connections), ..defaults })
}

fn policy_settings(file: &File) -> Result<policy::Settings, Error> {
    let defaults = policy::Settings::default();
    let within = |name, number: Option<u64>, default, bounds: RangeInclusive<u64>, kind| match number {
        Some(number) if !bounds.contains(&number) => Err(wrong(name, &number.to_string(), kind)),
        number => Ok(number.unwrap_or(default)),
    };
    let week = |name, seconds, default| within(name, seconds, default, 1..=policy::MAX_SECONDS, "1 to 604800, which is a week");
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

/// What a list names, which is separated by commas.
fn listed(list: &str) -> impl Iterator<Item = &str> {
    list.split(',').map(str::trim).filter(|item| !item.is_empty())
}

fn least_one(name: &str, number: Option<usize>, default: usize) -> Result<usize, Error> {
    match number {
        Some(0) => Err(wrong(name, "0", "at least 1")),
        number => Ok(number.unwrap_or(default)),
    }
}

fn wrong(name: &str, value: &str, kind: &'static str) -> Error {
    Error::Value { name: name.to_owned(), value: value.to_owned(), kind }
}

/// A request may wait for a change or for Kafka, and is not given up before.
fn request_time(file: &File, default: Duration) -> Result<Duration, Error> {
    let seconds = file.request_seconds.unwrap_or(default.as_secs());
    let longest = broker::MAX_WAIT_SECONDS.max(file.complete_wait_seconds.unwrap_or_default());
    if seconds > longest {
        return Ok(Duration::from_secs(seconds));
    }
    let kind = "more than LFS_BROKER_COMPLETE_WAIT_SECONDS, and more than the 30 s that a read may wait";
    Err(wrong("LFS_BROKER_REQUEST_SECONDS", &seconds.to_string(), kind))
}

fn http_settings(file: &File) -> Result<http::Settings, Error> {
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
            wrong("LFS_BROKER_TRUSTED_PROXIES", text, "addresses and networks such as 10.0.0.0/8, separated by commas")
        }),
    };
    let connections = least_one("LFS_BROKER_CONNECTIONS", file.connections, defaults.connections)?;
    Ok(http::Settings {
        header_time: at_least("LFS_BROKER_HEADER_SECONDS", file.header_seconds, 1, defaults.header_time)?,
        body_time: at_least("LFS_BROKER_BODY_SECONDS", file.body_seconds, 1, defaults.body_time)?,
        request_time: request_time(file, defaults.request_time)?,
        idle_time: at_least("LFS_BROKER_IDLE_SECONDS", file.idle_seconds, 1, defaults.idle_time)?,
        connections,
        // Shares of what there is, also where that is set lower.
        connections_per_address: file.connections_per_address.unwrap_or((connections / 2).max(1)),
        tenant_long_polls: file.tenant.long_polls.unwrap_or((connections / 4).max(1)),
        body_memory_bytes: match file.body_memory_bytes {
            Some(bytes) if !http::BODY_MEMORY.contains(&bytes) => {
                let kind = "1048576 to 1099511627776: a request with part hashes has up to 1 MiB";
                return Err(wrong("LFS_BROKER_BODY_MEMORY_BYTES", &bytes.to_string(), kind));
            }
            bytes => bytes.unwrap_or(defaults.body_memory_bytes),
        },
        shutdown_delay: file.shutdown_delay_seconds.map_or(defaults.shutdown_delay, Duration::from_secs),
        shutdown_grace: file.shutdown_grace_seconds.map_or(defaults.shutdown_grace, Duration::from_secs),
        tls,
        trusted_proxies: listed(&file.trusted_proxies).map(proxy).collect::<Result<_, _>>()?,
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
