//! A test broker that requires tokens, and tokens for it.

use jsonwebtoken::{EncodingKey, Header, encode};
use lfs_broker::{app, auth};
use serde_json::{Value, json};

use super::TestBroker;

/// The HS256 secret of the test broker and its callers.
pub(crate) const SECRET: &str = "a secret of thirty-two bytes or more";

impl TestBroker {
    /// Starts a broker that accepts a [`token`]; `change` may alter more of its settings.
    pub(crate) async fn start_with_tokens(change: impl FnOnce(&mut app::Settings)) -> Self {
        Self::start_with(|settings| {
            settings.auth = auth::Settings {
                mode: auth::Mode::Jwt,
                hs256_secret: Some(SECRET.into()),
                issuer: Some("it".into()),
                audience: Some("it".into()),
                ..auth::Settings::default()
            };
            // Some S3 servers accept an unsigned copy-source, and a broker with tokens would refuse to start on them.
            settings.objects.allow_copy_source = true;
            change(settings);
        })
        .await
    }
}

/// The claims of a valid token.
pub(crate) fn claims(tenant: &str, scope: &str, topics: &[&str]) -> Value {
    json!({"sub": "s", "tenant": tenant, "scope": scope, "topics": topics, "iss": "it", "aud": "it", "exp": 4_000_000_000u64})
}

/// A token with these claims, signed with the test broker's secret.
pub(crate) fn sign(claims: &Value) -> String {
    encode(&Header::default(), claims, &EncodingKey::from_secret(SECRET.as_bytes())).unwrap()
}

/// A token with this scope and these topics in one tenant.
pub(crate) fn token(tenant: &str, scope: &str, topics: &[&str]) -> String {
    sign(&claims(tenant, scope, topics))
}
