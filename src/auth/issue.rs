//! Making tokens, as a gateway's administrator would.

use jsonwebtoken::{EncodingKey, Header};

use super::{Auth, BadSettings, Mode, Scope, Settings, is_tenant};

/// What a new token says of its holder.
#[derive(Debug, Clone)]
pub struct Grant {
    /// The tenant it is bound to.
    pub tenant: String,
    /// Who holds it: `sub`.
    pub subject: String,
    /// What it allows.
    pub scopes: Vec<Scope>,
    /// The topics it is for; a trailing `*` is a wildcard.
    pub topics: Vec<String>,
    /// When it ends, in seconds since 1970.
    pub expires_at: u64,
}

/// Why no token is made.
#[derive(Debug, thiserror::Error)]
pub enum NotIssued {
    /// A token of a public key is made where the private one is.
    #[error("tokens are made with LFS_BROKER_JWT_HS256_SECRET, which is not set")]
    NoSecret,
    /// This broker would not accept it.
    #[error("{0}")]
    Settings(#[from] BadSettings),
    /// No tenant has such a name.
    #[error("tenant {0:?} is not 1 to 63 of a-z, 0-9 and -")]
    Tenant(String),
    /// Somebody must hold it.
    #[error("the subject is empty")]
    Subject,
    /// It could not be signed.
    #[error("the token cannot be signed: {0}")]
    Sign(#[from] jsonwebtoken::errors::Error),
}

/// What a token says, in the names of RFC 7519.
#[derive(serde::Serialize)]
struct Issued {
    sub: String,
    tenant: String,
    scope: String,
    topics: Vec<String>,
    iss: String,
    aud: String,
    exp: u64,
}

/// Makes a token that a broker with the same settings accepts.
///
/// # Errors
/// When there is no secret to sign with, or no broker would accept the outcome.
pub fn issue(settings: &Settings, grant: Grant) -> Result<String, NotIssued> {
    let secret = settings.hs256_secret.as_deref().ok_or(NotIssued::NoSecret)?;
    Auth::new(&Settings { mode: Mode::Jwt, ..settings.clone() })?;
    let (Some(iss), Some(aud)) = (settings.issuer.clone(), settings.audience.clone()) else {
        return Err(BadSettings::NoIssuer.into());
    };
    if !is_tenant(&grant.tenant) {
        return Err(NotIssued::Tenant(grant.tenant));
    }
    if grant.subject.is_empty() {
        return Err(NotIssued::Subject);
    }
    let scopes: Vec<&str> = grant.scopes.iter().map(|scope| scope.name()).collect();
    let Grant { tenant, subject: sub, topics, expires_at: exp, .. } = grant;
    let claims = Issued { sub, tenant, scope: scopes.join(" "), topics, iss, aud, exp };
    Ok(jsonwebtoken::encode(&Header::default(), &claims, &EncodingKey::from_secret(secret.as_bytes()))?)
}
