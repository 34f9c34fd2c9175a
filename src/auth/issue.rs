//! Issues tokens, for the `token` command.

use jsonwebtoken::{EncodingKey, Header};

use super::{Auth, BadSettings, Mode, Scope, Settings, is_valid_tenant};

/// The contents of a new token.
#[derive(Debug, Clone)]
pub struct Grant {
    /// The tenant that the token belongs to.
    pub tenant: String,
    /// The `sub` claim: who uses the token.
    pub subject: String,
    /// The scopes that the token grants.
    pub scopes: Vec<Scope>,
    /// The topics that the token allows. A trailing `*` is a wildcard.
    pub topics: Vec<String>,
    /// When the token expires, in seconds since 1970.
    pub expires_at: u64,
}

/// Why a token cannot be issued.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// The broker has no signing key: with a public key or a JWKS, only the owner of the private key can sign.
    #[error("tokens are signed with LFS_BROKER_JWT_HS256_SECRET, which is not set")]
    NoSecret,
    /// A broker with these settings would not accept the token.
    #[error("{0}")]
    Settings(#[from] BadSettings),
    /// The tenant name is not valid.
    #[error("tenant {0:?} is not valid: a tenant has 1 to 63 characters of a-z, 0-9 and -")]
    Tenant(String),
    /// A token needs a subject.
    #[error("the subject is empty")]
    Subject,
    /// Signing failed.
    #[error("the token cannot be signed: {0}")]
    Sign(#[from] jsonwebtoken::errors::Error),
}

/// The claims, with the names of RFC 7519.
#[derive(serde::Serialize)]
struct IssuedClaims {
    sub: String,
    tenant: String,
    scope: String,
    topics: Vec<String>,
    iss: String,
    aud: String,
    exp: u64,
}

/// Issues a token that a broker with the same settings accepts.
///
/// # Errors
/// If there is no secret to sign with, or if such a broker would not accept the token.
pub fn issue(settings: &Settings, grant: Grant) -> Result<String, IssueError> {
    let secret = settings.hs256_secret.as_deref().ok_or(IssueError::NoSecret)?;
    let settings = Settings { mode: Mode::Jwt, ..settings.clone() };
    Auth::new(&settings)?;
    let (Some(iss), Some(aud)) = (settings.issuer.clone(), settings.audience.clone()) else {
        return Err(BadSettings::Missing(settings.missing()).into());
    };
    if !is_valid_tenant(&grant.tenant) {
        return Err(IssueError::Tenant(grant.tenant));
    }
    if grant.subject.is_empty() {
        return Err(IssueError::Subject);
    }
    let scopes: Vec<&str> = grant.scopes.iter().map(|scope| scope.name()).collect();
    let Grant { tenant, subject: sub, topics, expires_at: exp, .. } = grant;
    let claims = IssuedClaims { sub, tenant, scope: scopes.join(" "), topics, iss, aud, exp };
    Ok(jsonwebtoken::encode(&Header::default(), &claims, &EncodingKey::from_secret(secret.as_bytes()))?)
}
