//! `token`: signs a token that a broker with the same settings accepts.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{Config, Error, talk};
use crate::auth::{self, Grant, Scope};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The tenant that it is bound to
    #[arg(long)]
    tenant: String,
    /// What it allows, of lfs:write, lfs:read and lfs:admin; may repeat
    #[arg(long = "scope", required = true, value_delimiter = ' ', value_parser = scope)]
    scopes: Vec<Scope>,
    /// A topic that it is for, a trailing * is a wildcard; may repeat
    #[arg(long = "topic")]
    topics: Vec<String>,
    /// How long it is good: seconds, or a number with s, m, h or d
    #[arg(long, default_value = "1h", value_parser = ttl)]
    ttl: Duration,
    /// Who holds it
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
    let each = match unit {
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => 1,
    };
    match number.parse::<u64>().ok().and_then(|number| number.checked_mul(each)).filter(|seconds| *seconds > 0) {
        Some(seconds) => Ok(Duration::from_secs(seconds)),
        None => Err("a time is like 90s, 15m, 8h or 30d".to_owned()),
    }
}

pub(super) fn token(arguments: Arguments) -> Result<(), Error> {
    let settings = arguments.config.load_auth()?;
    if arguments.topics.is_empty() && arguments.scopes.iter().any(|scope| *scope != Scope::Admin) {
        talk::note("note: without --topic this token opens, reads and resolves nothing");
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let grant = Grant {
        tenant: arguments.tenant,
        subject: arguments.subject,
        scopes: arguments.scopes,
        topics: arguments.topics,
        expires_at: now.saturating_add(arguments.ttl.as_secs()),
    };
    talk::data(&auth::issue(&settings, grant)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units_and_sense() {
        for (text, seconds) in [("90", 90), ("90s", 90), ("15m", 900), ("8h", 28_800), ("30d", 2_592_000)] {
            assert_eq!(ttl(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for text in ["", "h", "0", "-1", "1.5h", "1w", "18446744073709551615d"] {
            assert!(ttl(text).is_err(), "{text}");
        }
    }
}
