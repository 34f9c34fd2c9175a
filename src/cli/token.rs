//! `token`: signs a token that a broker with the same settings accepts.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::output::{print_data, print_note};
use super::{Config, Error};
use crate::auth::{self, Grant, Scope};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The tenant that the token belongs to
    #[arg(long)]
    tenant: String,
    /// A scope: lfs:write, lfs:read or lfs:admin; may repeat
    #[arg(long = "scope", required = true, value_delimiter = ' ', value_parser = scope)]
    scopes: Vec<Scope>,
    /// A topic that the token allows, with an optional trailing * as a wildcard; may repeat
    #[arg(long = "topic")]
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
    match number.parse::<u64>().ok().and_then(|number| number.checked_mul(unit_seconds)).filter(|seconds| *seconds > 0) {
        Some(seconds) => Ok(Duration::from_secs(seconds)),
        None => Err("a duration is written like 90s, 15m, 8h or 30d".to_owned()),
    }
}

pub(super) fn token(arguments: Arguments) -> Result<(), Error> {
    let settings = arguments.config.load_auth()?;
    if arguments.topics.is_empty() && arguments.scopes.iter().any(|scope| *scope != Scope::Admin) {
        print_note("note: without --topic this token cannot open, read or resolve any upload");
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let grant = Grant {
        tenant: arguments.tenant,
        subject: arguments.subject,
        scopes: arguments.scopes,
        topics: arguments.topics,
        expires_at: now.saturating_add(arguments.ttl.as_secs()),
    };
    print_data(&auth::issue(&settings, grant)?)
}

#[cfg(test)]
mod tests {
    use super::*;

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
