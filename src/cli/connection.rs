//! The broker that a command calls, and the token for it.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use lfs_broker_client::Client;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use super::Error;
use super::output::print_note;

/// A note about the same failure is repeated after this time, because a command may run for days.
const NOTE_INTERVAL: Duration = Duration::from_secs(60);

#[derive(clap::Args)]
pub(super) struct Connection {
    /// The URL of the broker
    #[arg(long, env = "LFS_BROKER_URL", default_value = "http://127.0.0.1:8080")]
    pub(super) broker: String,
    /// A bearer token
    #[arg(long, env = "LFS_BROKER_TOKEN", hide_env_values = true)]
    pub(super) token: Option<String>,
    /// Print JSON for programs, and no progress
    #[arg(long)]
    pub(super) json: bool,
}

impl Connection {
    pub(super) fn client(&self) -> Result<Client, Error> {
        client(&self.broker, self.token.as_deref())
    }
}

/// Parses the id of an upload, which is an argument of `put` and `get`.
pub(super) fn upload_id(text: &str) -> Result<Uuid, String> {
    text.parse().map_err(|_| "not an upload id (a UUID such as 01934d2e-7c00-7000-8000-5f2b8c1d9e3a)".to_owned())
}

/// A client that prints a note when a request fails and is retried.
pub(super) fn client(broker: &str, token: Option<&str>) -> Result<Client, Error> {
    let last_note: Mutex<Option<(String, Instant)>> = Mutex::default();
    let client = Client::new(broker)?.on_retry(move |event| {
        let cause = event.error.to_string();
        let mut last_note = last_note.lock().unwrap_or_else(PoisonError::into_inner);
        if !last_note.as_ref().is_some_and(|(text, at)| *text == cause && at.elapsed() < NOTE_INTERVAL) {
            print_note(&format!("note: {cause}; retrying for up to {} s", event.remaining.as_secs_f64().ceil()));
            *last_note = Some((cause, Instant::now()));
        }
    });
    Ok(match token {
        Some(token) => client.with_token(token),
        None => client,
    })
}

/// The hint for a request that the broker refused because of its token.
pub(super) fn token_hint(token: Option<&str>) -> String {
    let how = "`lfs-broker token` prints a new one; set it with LFS_BROKER_TOKEN or --token";
    let Some(token) = token else { return format!("the command has no token; {how}") };
    match expires_at(token) {
        Some(expires_at) if expires_at <= OffsetDateTime::now_utc() => {
            format!("the token expired at {}; {how}", expires_at.format(&Rfc3339).unwrap_or_default())
        }
        Some(_) => "the token must be signed by a key that this broker trusts, for its issuer and its audience".to_owned(),
        None => format!("the token is not a JWT with an expiry time; {how}"),
    }
}

/// The claim `exp` of a JWT. The signature is not verified, so the time is only for a hint.
fn expires_at(token: &str) -> Option<OffsetDateTime> {
    let claims = URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
    let claims: serde_json::Value = serde_json::from_slice(&claims).ok()?;
    OffsetDateTime::from_unix_timestamp(claims.get("exp")?.as_i64()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_token_gets_the_hint_that_fits_it() {
        let token = |claims: &str| format!("x.{}.y", URL_SAFE_NO_PAD.encode(claims));
        assert!(token_hint(None).starts_with("the command has no token"));
        let expired = token_hint(Some(&token(r#"{"exp":1000000000}"#)));
        assert!(expired.starts_with("the token expired at 2001-09-09T01:46:40Z; `lfs-broker token`"), "{expired}");
        assert!(token_hint(Some(&token(r#"{"exp":32503680000}"#))).contains("a key that this broker trusts"));
        for other in ["secret", "a.b.c", &token("{}"), &token("[]")] {
            assert!(token_hint(Some(other)).starts_with("the token is not a JWT"), "{other}");
        }
    }
}
