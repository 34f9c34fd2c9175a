//! Settings of `serve`: the environment overrides the TOML file, and the file overrides the defaults.
//!
//! Each module declares its own settings and their defaults. One table maps them to environment variables and TOML keys: for
//! example, `LFS_BROKER_S3_BUCKET` is `bucket` in the file's table `[s3]`. A variable with the suffix `_FILE` names a file
//! that holds the value, for mounted secrets.

mod documentation;
mod error;
mod file;
mod setting;
mod table;
mod urls;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use ipnet::IpNet;

use crate::{app, auth, http, kafka, objects, store};
pub use documentation::documentation;
pub use error::Error;
use file::{File, read_text};
use setting::{Draft, Setting};
pub(crate) use urls::parse_origin;
use urls::{public_url, url_host};

/// The environment: every variable and its value.
pub type Environment = BTreeMap<String, String>;

/// Loads the settings of `serve`.
///
/// # Errors
/// If a setting is missing, unknown or not valid. The error names the setting.
pub fn load(file: Option<&Path>, environment: &Environment) -> Result<app::Settings, Error> {
    let mut draft = read(file, environment)?;
    draft.app.auth.public_key_pem = public_key(&draft)?;
    let tls = draft.raw.certificate_file.as_ref().zip(draft.raw.key_file.as_ref());
    let tls = tls.map(|(certificate, key)| http::tls::Settings::new(certificate, key));
    let mut required = vec!["DATABASE_URL", "KAFKA_BOOTSTRAP_SERVERS"];
    if draft.raw.certificate_file.is_some() || draft.raw.key_file.is_some() {
        required.extend(["LFS_BROKER_TLS_CERTIFICATE_FILE", "LFS_BROKER_TLS_KEY_FILE"]);
    }
    let mut missing = missing(&mut draft, &required);
    if !missing.is_empty() {
        // A first start needs these too, so they are named in the same error.
        missing.extend(draft.app.auth.missing());
        return Err(Error::Missing(missing));
    }
    let trusted_proxies = draft.raw.trusted_proxies.iter().map(|text| proxy(text)).collect::<Result<_, _>>()?;
    let mut app = draft.app;
    app.public_url = public_url(app.public_url)?;
    app.cors_origins = app.cors_origins.iter().map(|origin| parse_origin(origin)).collect::<Result<_, _>>()?;
    let allowed_hosts = (app.auth.mode == auth::Mode::None).then(|| http::AllowedHosts {
        hosts: app.public_url.as_deref().and_then(url_host).into_iter().collect(),
        origins: app.cors_origins.clone(),
    });
    if app.http.request_timeout <= app.broker.complete_wait {
        let seconds = |time: Duration| time.as_secs().to_string();
        let expected = format!("more than LFS_BROKER_COMPLETE_WAIT_SECONDS, which is {}", seconds(app.broker.complete_wait));
        return Err(Error::value("LFS_BROKER_REQUEST_SECONDS", &seconds(app.http.request_timeout), expected));
    }
    app.http = http::Settings {
        // The defaults are shares of the configured number of connections.
        connections_per_address: draft.raw.connections_per_address.unwrap_or((app.http.connections / 2).max(1)),
        tenant_long_polls: draft.raw.tenant_long_polls.unwrap_or((app.http.connections / 4).max(1)),
        tls,
        trusted_proxies,
        allowed_hosts,
        ..app.http
    };
    Ok(app)
}

/// Loads the database settings, which is all that `migrate` needs.
///
/// # Errors
/// As [`load`], but only the database URL is required.
pub fn load_store(file: Option<&Path>, environment: &Environment) -> Result<store::Settings, Error> {
    let mut draft = read(file, environment)?;
    refuse_missing(missing(&mut draft, &["DATABASE_URL"]))?;
    Ok(draft.app.store)
}

/// Loads the authentication settings, which is all that `token` needs.
///
/// # Errors
/// As [`load`], but no setting is required.
pub fn load_auth(file: Option<&Path>, environment: &Environment) -> Result<auth::Settings, Error> {
    let draft = read(file, environment)?;
    Ok(auth::Settings { public_key_pem: public_key(&draft)?, ..draft.app.auth })
}

/// Loads the Kafka settings, which is all that `consume` needs.
///
/// # Errors
/// As [`load`], but only the bootstrap servers are required.
pub fn load_kafka(file: Option<&Path>, environment: &Environment) -> Result<kafka::Settings, Error> {
    let mut draft = read(file, environment)?;
    refuse_missing(missing(&mut draft, &["KAFKA_BOOTSTRAP_SERVERS"]))?;
    Ok(draft.app.kafka)
}

/// Loads the S3 settings, which is all that following references needs.
///
/// # Errors
/// As [`load`], but no setting is required.
pub fn load_objects(file: Option<&Path>, environment: &Environment) -> Result<objects::Settings, Error> {
    Ok(read(file, environment)?.app.objects)
}

/// Reads the file and the environment, and checks each value by itself.
fn read(file: Option<&Path>, environment: &Environment) -> Result<Draft, Error> {
    let unknown: Vec<String> = environment.iter().filter(|(name, value)| !is_known(name, value)).map(unknown_variable).collect();
    if !unknown.is_empty() {
        return Err(Error::Unknown(unknown));
    }
    let mut file = file.map(File::read).transpose()?.unwrap_or_default();
    let mut draft = Draft::default();
    for setting in table::settings() {
        if let Some(text) = from_environment(setting, environment)? {
            setting.set(&mut draft, setting.variable, &text)?;
        } else if let Some(text) = file.values.remove(setting.key) {
            setting.set(&mut draft, setting.key, &text)?;
        }
    }
    draft.app.kafka.properties = file.properties;
    Ok(draft)
}

fn from_environment(setting: &Setting, environment: &Environment) -> Result<Option<String>, Error> {
    if table::SDK_VARIABLES.contains(&setting.variable) {
        return Ok(None);
    }
    // docker-compose sets a variable without a value to an empty text.
    let variable = |name: &str| environment.get(name).filter(|value| !value.is_empty());
    match (variable(setting.variable), variable(&format!("{}_FILE", setting.variable))) {
        (Some(value), _) => Ok(Some(value.clone())),
        (None, Some(path)) => Ok(Some(read_text(path)?.trim_end_matches(['\r', '\n']).to_owned())),
        (None, None) => Ok(None),
    }
}

/// The variables that settings and the command line read.
fn variables() -> impl Iterator<Item = &'static str> {
    table::settings().map(|setting| setting.variable).chain(table::CLI_VARIABLES.map(|(name, _)| name))
}

/// Whether the variable belongs to another program, or is a variable that this program reads.
fn is_known(name: &str, value: &str) -> bool {
    // Kubernetes gives every container such variables for each service, also for one with the name `lfs-broker`.
    let is_service_link = name.ends_with("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || name.contains("_PORT_")
        || (name.ends_with("_PORT") && value.contains("://"));
    // The contract reserves the address of the metrics, which this version does not serve yet.
    let is_reserved = name == "LFS_BROKER_METRICS_LISTEN";
    !name.starts_with("LFS_BROKER_")
        || is_service_link
        || is_reserved
        || variables().any(|known| name == known || name.strip_suffix("_FILE") == Some(known))
}

fn unknown_variable((name, _): (&String, &String)) -> String {
    table::unknown(name, variables())
}

/// The settings of these variables that have no value.
fn missing(draft: &mut Draft, variables: &[&str]) -> Vec<&'static str> {
    let required = table::settings().filter(|setting| variables.contains(&setting.variable));
    required.filter(|setting| (setting.field)(draft).get().is_none()).map(|setting| setting.variable).collect()
}

/// Refuses missing settings, all at once.
fn refuse_missing(missing: Vec<&'static str>) -> Result<(), Error> {
    if missing.is_empty() { Ok(()) } else { Err(Error::Missing(missing)) }
}

fn public_key(draft: &Draft) -> Result<Option<String>, Error> {
    draft.raw.public_key_file.as_deref().map(read_text).transpose()
}

fn proxy(text: &str) -> Result<IpNet, Error> {
    let expected = "IP addresses and networks such as 10.0.0.0/8, separated by commas";
    let address = text.parse::<IpAddr>().map(IpNet::from).ok();
    address.or_else(|| text.parse().ok()).ok_or_else(|| Error::value("LFS_BROKER_TRUSTED_PROXIES", text, expected))
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
