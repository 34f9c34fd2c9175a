//! Authentication: turns a bearer token into a caller. With auth mode `none`, every caller is anonymous.
//!
//! Tokens are JWTs, checked as RFC 8725 recommends. The key decides the algorithms, never the token, and `kid` only selects a
//! key. The headers `jku`, `jwk` and `x5u` are ignored, and `crit` is refused.

mod issue;
mod jwks;
mod keys;

use std::sync::Arc;

use jsonwebtoken::decode_header;
use jsonwebtoken::errors::ErrorKind;

pub use issue::{Grant, IssueError, issue};
use jwks::Jwks;
use keys::{RequiredClaims, VerificationKey};

/// The longest `sub`, in bytes. OpenID Connect allows 255 characters; a PostgreSQL index row has room for 2,700 bytes.
const MAX_SUBJECT_BYTES: usize = 1024;

/// How callers are authenticated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// With JWT bearer tokens.
    #[default]
    Jwt,
    /// Without tokens: one tenant that may do everything. Allowed on loopback only.
    None,
}

/// What a caller may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    /// `lfs:write`: open, sign parts, complete, abort.
    Write,
    /// `lfs:read`: read, list, resolve.
    Read,
    /// `lfs:admin`: administer the whole broker.
    Admin,
}

impl Scope {
    /// Every scope.
    pub const ALL: [Self; 3] = [Self::Write, Self::Read, Self::Admin];

    /// The scope's name in tokens.
    pub fn name(self) -> &'static str {
        match self {
            Self::Write => "lfs:write",
            Self::Read => "lfs:read",
            Self::Admin => "lfs:admin",
        }
    }

    /// The scope with this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|scope| scope.name() == name)
    }
}

/// An authenticated caller.
#[derive(Debug, Clone)]
pub struct Caller {
    /// The tenant that owns the caller's uploads.
    pub tenant: String,
    /// The token's `sub`.
    pub subject: String,
    /// The caller's scopes.
    pub scopes: Vec<Scope>,
    /// The topics that the caller may use. A trailing `*` is a wildcard.
    pub topics: Vec<String>,
}

impl Caller {
    /// The caller that a broker without tokens sees.
    pub fn anonymous() -> Self {
        Self {
            tenant: "default".to_owned(),
            subject: "anonymous".to_owned(),
            scopes: vec![Scope::Write, Scope::Read, Scope::Admin],
            topics: vec!["*".to_owned()],
        }
    }

    /// Whether the caller has this scope.
    pub fn has(&self, scope: Scope) -> bool {
        self.scopes.contains(&scope)
    }

    /// Whether the caller may administer the whole broker.
    pub fn is_admin(&self) -> bool {
        self.has(Scope::Admin)
    }

    /// Whether the caller may use this topic.
    pub fn may_use(&self, topic: &str) -> bool {
        self.topics.iter().any(|allowed| match allowed.strip_suffix('*') {
            Some(prefix) => topic.starts_with(prefix),
            None => allowed == topic,
        })
    }

    /// The caller's topics, as exact names and as prefixes.
    pub fn topic_filter(&self) -> (Vec<String>, Vec<String>) {
        let (mut names, mut prefixes) = (Vec::new(), Vec::new());
        for topic in &self.topics {
            match topic.strip_suffix('*') {
                Some(prefix) => prefixes.push(prefix.to_owned()),
                None => names.push(topic.clone()),
            }
        }
        (names, prefixes)
    }
}

/// Why a request is not authenticated.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("no bearer token")]
    Unauthenticated,
    #[error("{0}")]
    Invalid(&'static str),
    /// The cause may quote the token, so it is for the log only.
    #[error("the token is not valid here: {0}")]
    VerificationFailed(String),
    #[error("the token keys cannot be fetched")]
    Unavailable,
}

/// How tokens are verified.
#[derive(Clone, Default)]
pub struct Settings {
    /// `LFS_BROKER_AUTH_MODE`.
    pub mode: Mode,
    /// `LFS_BROKER_JWT_HS256_SECRET`.
    pub hs256_secret: Option<String>,
    /// The PEM text of `LFS_BROKER_JWT_PUBLIC_KEY_FILE`.
    pub public_key_pem: Option<String>,
    /// `LFS_BROKER_JWT_JWKS_URL`.
    pub jwks_url: Option<String>,
    /// `LFS_BROKER_JWT_ISSUER`.
    pub issuer: Option<String>,
    /// `LFS_BROKER_JWT_AUDIENCE`.
    pub audience: Option<String>,
}

impl Settings {
    /// The settings that mode `jwt` needs and that are not set.
    pub(crate) fn missing(&self) -> Vec<&'static str> {
        const KEY: &str = "LFS_BROKER_JWT_HS256_SECRET (or LFS_BROKER_JWT_PUBLIC_KEY_FILE or LFS_BROKER_JWT_JWKS_URL)";
        let has_key = self.hs256_secret.is_some() || self.public_key_pem.is_some() || self.jwks_url.is_some();
        let needed = [
            (has_key, KEY),
            (self.issuer.is_some(), "LFS_BROKER_JWT_ISSUER"),
            (self.audience.is_some(), "LFS_BROKER_JWT_AUDIENCE"),
        ];
        needed.into_iter().filter(|(is_set, _)| self.mode == Mode::Jwt && !is_set).map(|(_, name)| name).collect()
    }
}

/// Why the authentication settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BadSettings {
    /// With several key sources, it would be unclear which one applies.
    #[error(
        "auth mode jwt needs one of LFS_BROKER_JWT_HS256_SECRET, LFS_BROKER_JWT_PUBLIC_KEY_FILE and LFS_BROKER_JWT_JWKS_URL, \
         found {0}"
    )]
    KeyCount(usize),
    /// Mode `jwt` needs a key source, an issuer and an audience.
    #[error("auth mode jwt needs settings that are not set: {}", .0.join(", "))]
    Missing(Vec<&'static str>),
    /// A short secret can be guessed.
    #[error("LFS_BROKER_JWT_HS256_SECRET has {0} bytes, at least 32 are needed (RFC 7518, section 3.2)")]
    ShortSecret(usize),
    /// The PEM file does not hold a public key of a supported type.
    #[error("the public key is not an RSA, P-256 or Ed25519 key in PEM: {0}")]
    Pem(jsonwebtoken::errors::Error),
    /// Over plain HTTP, an attacker on the network could replace the keys.
    #[error("LFS_BROKER_JWT_JWKS_URL must begin with https://, or name a loopback address")]
    InsecureUrl,
    /// The HTTP client that fetches the keys cannot be built.
    #[error("LFS_BROKER_JWT_JWKS_URL cannot be used: {0}")]
    Client(reqwest::Error),
}

/// Turns a request's `Authorization` header into a caller.
pub(crate) enum Auth {
    None,
    StaticKey(Box<VerificationKey>),
    Jwks(Arc<Jwks>),
}

/// The claims that the broker reads. The JWT library checks `iss`, `aud`, `exp` and `nbf`.
#[derive(Debug, Clone, serde::Deserialize)]
struct Claims {
    sub: String,
    tenant: String,
    scope: String,
    #[serde(default)]
    topics: Vec<String>,
}

impl Auth {
    /// Builds the authentication from checked settings.
    pub(crate) fn new(settings: &Settings) -> Result<Self, BadSettings> {
        if settings.mode == Mode::None {
            return Ok(Self::None);
        }
        let (secret, pem, url) = (&settings.hs256_secret, &settings.public_key_pem, &settings.jwks_url);
        let given = usize::from(secret.is_some()) + usize::from(pem.is_some()) + usize::from(url.is_some());
        if given > 1 {
            return Err(BadSettings::KeyCount(given));
        }
        let (1, Some(issuer), Some(audience)) = (given, &settings.issuer, &settings.audience) else {
            return Err(BadSettings::Missing(settings.missing()));
        };
        let required = RequiredClaims { issuer: issuer.clone(), audience: audience.clone() };
        match (secret, pem, url) {
            (Some(secret), ..) => Ok(Self::StaticKey(Box::new(VerificationKey::from_secret(secret, &required)?))),
            (_, Some(pem), _) => Ok(Self::StaticKey(Box::new(VerificationKey::from_pem(pem, &required)?))),
            (_, _, url) => Ok(Self::Jwks(Arc::new(Jwks::new(url.as_deref().unwrap_or_default(), required)?))),
        }
    }

    /// Fetches the key set now, so that the first caller does not wait for it.
    pub(crate) fn prefetch_keys(&self) {
        if let Self::Jwks(jwks) = self {
            jwks.refresh_in_background();
        }
    }

    /// Whether callers belong to different tenants.
    pub(crate) fn has_tenants(&self) -> bool {
        !matches!(self, Self::None)
    }

    /// The caller that this `Authorization` header identifies.
    pub(crate) async fn caller(&self, authorization: Option<&str>) -> Result<Caller, Error> {
        if let Self::None = self {
            return Ok(Caller::anonymous());
        }
        let authorization = authorization.ok_or(Error::Unauthenticated)?;
        let (scheme, token) = authorization.split_once(' ').ok_or(Error::Unauthenticated)?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Err(Error::Unauthenticated);
        }
        let claims = self.claims(token.trim()).await?;
        if !is_valid_tenant(&claims.tenant) || !is_valid_subject(&claims.sub) {
            return Err(Error::Invalid("the token's tenant or sub is not valid"));
        }
        // No Kafka topic has such a name, and PostgreSQL cannot store a NUL in a text.
        if claims.topics.iter().any(|topic| topic.chars().any(char::is_control)) {
            return Err(Error::Invalid("the token's topics contain control characters"));
        }
        let scopes = claims.scope.split(' ').filter_map(Scope::named);
        Ok(Caller { scopes: scopes.collect(), tenant: claims.tenant, subject: claims.sub, topics: claims.topics })
    }

    async fn claims(&self, token: &str) -> Result<Claims, Error> {
        let failed = |error: jsonwebtoken::errors::Error| match error.kind() {
            // The signature is checked first, so only the holder of a real token sees this reason.
            ErrorKind::ExpiredSignature => Error::Invalid("the token has expired"),
            _ => Error::VerificationFailed(error.to_string()),
        };
        let header = decode_header(token).map_err(failed)?;
        if header.crit.is_some() {
            return Err(Error::Invalid("the token's header has crit, but the broker supports no extension"));
        }
        let claims = match self {
            Self::None => return Err(Error::Unauthenticated),
            Self::StaticKey(key) => key.verify(token),
            Self::Jwks(jwks) => jwks.key(header.kid.as_deref(), header.alg).await?.verify(token),
        };
        claims.map_err(failed)
    }
}

/// Whether this `sub` is valid: it becomes part of an index key, of upload histories and of logs.
fn is_valid_subject(name: &str) -> bool {
    (1..=MAX_SUBJECT_BYTES).contains(&name.len()) && !name.chars().any(char::is_control)
}

/// Whether this tenant name is valid: it becomes part of object keys.
fn is_valid_tenant(name: &str) -> bool {
    (1..=63).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}
