//! `token`: signs a token that a broker with the same settings accepts.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::output::{print_data, print_note};
use super::{Config, Error};
use crate::auth::{self, Grant, Scope};
use crate::config;

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The tenant that the token belongs to
    #[arg(long)]
    tenant: String,
    /// A scope: lfs:write, lfs:read or lfs:admin; may repeat
    #[arg(long = "scope", required = true, value_delimiter = ' ', value_parser = scope)]
    scopes: Vec<Scope>,
    /// A topic that the token allows, with an optional trailing * as a wildcard; may repeat
    #[arg(long = "topic", value_parser = topic)]
    topics: Vec<String>,
    /// How long the token is valid: seconds, or a number with s, m, h or d
    #[arg(long, default_value = "1h", value_parser = ttl)]
    ttl: Duration,
    /// The subject of the token: who uses it
    #[arg(long, default_value = "lfs-broker-cli")]
    subject: String,
    #[command(flatten)]
    config: Config,
}

fn scope(name: &str) -> Result<Scope, String> {
    Scope::named(name).ok_or_else(|| "the scopes are lfs:write, lfs:read and lfs:admin".to_owned())
}

/// The broker compares any other `*` as a character, and no topic of Kafka has it in its name.
fn topic(text: &str) -> Result<String, String> {
    match text.strip_suffix('*').unwrap_or(text).contains('*') {
        true => Err("only a * at the end is a wildcard, such as videos*".to_owned()),
        false => Ok(text.to_owned()),
    }
}

fn ttl(text: &str) -> Result<Duration, String> {
    let (number, unit) = match text.strip_suffix(['s', 'm', 'h', 'd']) {
        Some(number) => (number, &text[number.len()..]),
        None => (text, "s"),
    };
    let unit_seconds = match unit {
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => 1,
    };
    match number.parse::<u64>().ok().and_then(|number| number.checked_mul(unit_seconds)) {
        Some(0) => Err("must be more than 0".to_owned()),
        Some(seconds) => Ok(Duration::from_secs(seconds)),
        None => Err("a duration is written like 90s, 15m, 8h or 30d".to_owned()),
    }
}

pub(super) fn token(arguments: Arguments) -> Result<(), Error> {
    let settings = arguments.config.load_auth()?;
    let needed = [
        ("LFS_BROKER_JWT_HS256_SECRET", settings.hs256_secret.is_some()),
        ("LFS_BROKER_JWT_ISSUER", settings.issuer.is_some()),
        ("LFS_BROKER_JWT_AUDIENCE", settings.audience.is_some()),
    ];
    let missing: Vec<&str> = needed.into_iter().filter(|(_, is_set)| !is_set).map(|(name, _)| name).collect();
    if !missing.is_empty() {
        return Err(config::Error::Missing(missing).into());
    }
    let has_no_topic = arguments.topics.is_empty() && arguments.scopes.iter().any(|scope| *scope != Scope::Admin);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let grant = Grant {
        tenant: arguments.tenant,
        subject: arguments.subject,
        scopes: arguments.scopes,
        topics: arguments.topics,
        expires_at: now.saturating_add(arguments.ttl.as_secs()),
    };
    let token = auth::issue(&settings, grant)?;
    if has_no_topic {
        print_note("note: without --topic this token cannot open, read or resolve any upload");
    }
    print_data(&token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_star_at_the_end_of_a_topic_is_a_wildcard() {
        for text in ["videos", "videos*", "*"] {
            assert_eq!(topic(text).as_deref(), Ok(text));
        }
        for text in ["vid*eos", "*videos", "videos**"] {
            assert!(topic(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_token_lifetime_is_a_positive_number_with_an_optional_unit() {
        for (text, seconds) in [("90", 90), ("90s", 90), ("15m", 900), ("8h", 28_800), ("30d", 2_592_000)] {
            assert_eq!(ttl(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for text in ["", "h", "0", "-1", "1.5h", "1w", "18446744073709551615d"] {
            assert!(ttl(text).is_err(), "{text}");
        }
    }
}
