//! A house whose callers need tokens, and such tokens.

use jsonwebtoken::{EncodingKey, Header, encode};
use lfs_broker::{app, auth};
use serde_json::{Value, json};

use super::House;

/// The secret that the house and its callers share.
pub(crate) const SECRET: &str = "a secret of thirty-two bytes or more";

impl House {
    /// A house that lets in who bears a [`token`]; `change` may alter more of its settings.
    pub(crate) async fn with_tokens(change: impl FnOnce(&mut app::Settings)) -> Self {
        Self::with(|settings| {
            settings.auth = auth::Settings {
                mode: auth::Mode::Jwt,
                hs256_secret: Some(SECRET.into()),
                issuer: Some("it".into()),
                audience: Some("it".into()),
                ..auth::Settings::default()
            };
            // Some of the stores take an unsigned copy-source, on which a house with tokens would not start.
            settings.objects.allow_copy_source = true;
            change(settings);
        })
        .await
    }
}

/// What a token says that is let in.
pub(crate) fn claims(tenant: &str, scope: &str, topics: &[&str]) -> Value {
    json!({"sub": "s", "tenant": tenant, "scope": scope, "topics": topics, "iss": "it", "aud": "it", "exp": 4_000_000_000u64})
}

/// The token of these claims, signed with the house's secret.
pub(crate) fn sign(claims: &Value) -> String {
    encode(&Header::default(), claims, &EncodingKey::from_secret(SECRET.as_bytes())).unwrap()
}

/// The token of one who may do this in one tenant.
pub(crate) fn token(tenant: &str, scope: &str, topics: &[&str]) -> String {
    sign(&claims(tenant, scope, topics))
}
