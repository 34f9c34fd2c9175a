//! Who is asking: a bearer token turned into a caller, or nobody asked for one.
//!
//! Tokens are JWTs, checked as RFC 8725 says: the algorithms are pinned by the key and never taken from the token, `kid`
//! only picks a key, what else a header offers (`jku`, `jwk`, `x5u`) is not looked at, and `crit` is refused.

mod issue;
mod jwks;
mod keys;

use std::sync::Arc;

use jsonwebtoken::decode_header;

pub use issue::{Grant, NotIssued, issue};
use jwks::Jwks;
use keys::{Key, Rules};

/// The longest `sub`, in bytes: OpenID Connect allows 255 characters, and a row of an index has room for 2,700 bytes.
const SUBJECT_BYTES: usize = 1024;

/// How callers are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// By JWT bearer tokens.
    #[default]
    Jwt,
    /// Not at all: one tenant, everything allowed; only on loopback.
    None,
}

/// What a caller may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    /// `lfs:write`: open, sign, complete, abort.
    Write,
    /// `lfs:read`: read, list, resolve.
    Read,
    /// `lfs:admin`: broker-wide.
    Admin,
}

impl Scope {
    /// Every scope.
    pub const ALL: [Self; 3] = [Self::Write, Self::Read, Self::Admin];

    /// The name in tokens.
    pub fn name(self) -> &'static str {
        match self {
            Self::Write => "lfs:write",
            Self::Read => "lfs:read",
            Self::Admin => "lfs:admin",
        }
    }

    /// The scope of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|scope| scope.name() == name)
    }
}

/// Somebody who was let in.
#[derive(Debug, Clone)]
pub struct Caller {
    /// The tenant that everything they open belongs to.
    pub tenant: String,
    /// The token's `sub`.
    pub subject: String,
    /// What they may do.
    pub scopes: Vec<Scope>,
    /// Topics they may use; a trailing `*` is a wildcard.
    pub topics: Vec<String>,
}

impl Caller {
    /// The caller of a broker without tokens.
    pub fn anyone() -> Self {
        Self {
            tenant: "default".to_owned(),
            subject: "anonymous".to_owned(),
            scopes: vec![Scope::Write, Scope::Read, Scope::Admin],
            topics: vec!["*".to_owned()],
        }
    }

    /// Whether they have a scope.
    pub fn has(&self, scope: Scope) -> bool {
        self.scopes.contains(&scope)
    }

    /// Whether they may act broker-wide.
    pub fn is_admin(&self) -> bool {
        self.has(Scope::Admin)
    }

    /// Whether they may use a topic.
    pub fn may_use(&self, topic: &str) -> bool {
        self.topics.iter().any(|allowed| match allowed.strip_suffix('*') {
            Some(prefix) => topic.starts_with(prefix),
            None => allowed == topic,
        })
    }

    /// Their topics as exact names and prefixes.
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

/// Why nobody was let in.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("no bearer token")]
    Unauthenticated,
    #[error("{0}")]
    Invalid(&'static str),
    /// The cause may quote the token: it is for the log alone.
    #[error("the token is not valid here: {0}")]
    Refused(String),
    #[error("the keys of tokens cannot be fetched")]
    Unavailable,
}

/// How tokens are checked.
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

/// Settings that let nobody in.
#[derive(Debug, thiserror::Error)]
pub enum BadSettings {
    /// `jwt` without a key, or with more than one: which would count?
    #[error(
        "auth mode jwt needs one of LFS_BROKER_JWT_HS256_SECRET, LFS_BROKER_JWT_PUBLIC_KEY_FILE and LFS_BROKER_JWT_JWKS_URL, \
         found {0}"
    )]
    OneKey(usize),
    /// `jwt` with an issuer or audience missing.
    #[error("auth mode jwt needs LFS_BROKER_JWT_ISSUER and LFS_BROKER_JWT_AUDIENCE")]
    NoIssuer,
    /// A secret that can be guessed.
    #[error("LFS_BROKER_JWT_HS256_SECRET has {0} bytes, at least 32 are needed (RFC 7518, section 3.2)")]
    ShortSecret(usize),
    /// A PEM that is not a public key of a kind that is used here.
    #[error("the public key is not an RSA, P-256 or Ed25519 key in PEM: {0}")]
    Pem(jsonwebtoken::errors::Error),
    /// Whoever sits between here and there could make tokens.
    #[error("LFS_BROKER_JWT_JWKS_URL must begin with https://, or name a loopback address")]
    PlainUrl,
    /// No client for the keys.
    #[error("LFS_BROKER_JWT_JWKS_URL cannot be used: {0}")]
    Client(reqwest::Error),
}

/// Turns a request's `Authorization` into a caller.
pub(crate) enum Auth {
    None,
    Fixed(Box<Key>),
    Remote(Arc<Jwks>),
}

/// What is read of a token; `iss`, `aud`, `exp` and `nbf` are checked beside it.
#[derive(Debug, Clone, serde::Deserialize)]
struct Claims {
    sub: String,
    tenant: String,
    scope: String,
    #[serde(default)]
    topics: Vec<String>,
}

impl Auth {
    /// Checks the settings.
    pub(crate) fn new(settings: &Settings) -> Result<Self, BadSettings> {
        if settings.mode == Mode::None {
            return Ok(Self::None);
        }
        let (secret, pem, url) = (&settings.hs256_secret, &settings.public_key_pem, &settings.jwks_url);
        let given = usize::from(secret.is_some()) + usize::from(pem.is_some()) + usize::from(url.is_some());
        if given != 1 {
            return Err(BadSettings::OneKey(given));
        }
        let (Some(issuer), Some(audience)) = (&settings.issuer, &settings.audience) else { return Err(BadSettings::NoIssuer) };
        let rules = Rules { issuer: issuer.clone(), audience: audience.clone() };
        match (secret, pem, url) {
            (Some(secret), ..) => Ok(Self::Fixed(Box::new(Key::of_secret(secret, &rules)?))),
            (_, Some(pem), _) => Ok(Self::Fixed(Box::new(Key::of_pem(pem, &rules)?))),
            (_, _, url) => Ok(Self::Remote(Arc::new(Jwks::new(url.as_deref().unwrap_or_default(), rules)?))),
        }
    }

    /// Fetches what will be needed, so that the first caller need not wait for it.
    pub(crate) fn warm(&self) {
        if let Self::Remote(jwks) = self {
            jwks.warm();
        }
    }

    /// Whether callers have tenants of their own.
    pub(crate) fn tells_tenants_apart(&self) -> bool {
        !matches!(self, Self::None)
    }

    /// Who sends this `Authorization`.
    pub(crate) async fn caller(&self, authorization: Option<&str>) -> Result<Caller, Error> {
        if let Self::None = self {
            return Ok(Caller::anyone());
        }
        let authorization = authorization.ok_or(Error::Unauthenticated)?;
        let (scheme, token) = authorization.split_once(' ').ok_or(Error::Unauthenticated)?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Err(Error::Unauthenticated);
        }
        let claims = self.claims(token.trim()).await?;
        if !is_tenant(&claims.tenant) || !is_subject(&claims.sub) {
            return Err(Error::Invalid("the token's tenant or sub has the wrong shape"));
        }
        // No topic has such a name, and PostgreSQL has no text with a NUL.
        if claims.topics.iter().any(|topic| topic.chars().any(char::is_control)) {
            return Err(Error::Invalid("the token's topics have control characters"));
        }
        let scopes = claims.scope.split(' ').filter_map(Scope::named);
        Ok(Caller { scopes: scopes.collect(), tenant: claims.tenant, subject: claims.sub, topics: claims.topics })
    }

    async fn claims(&self, token: &str) -> Result<Claims, Error> {
        let refused = |error: jsonwebtoken::errors::Error| Error::Refused(error.to_string());
        let header = decode_header(token).map_err(refused)?;
        if header.crit.is_some() {
            return Err(Error::Invalid("the token's header has crit, and no extension is known here"));
        }
        let read = match self {
            Self::None => return Err(Error::Unauthenticated),
            Self::Fixed(key) => key.read(token),
            Self::Remote(jwks) => jwks.key(header.kid.as_deref(), header.alg).await?.read(token),
        };
        read.map_err(refused)
    }
}

/// Whether a token may name its bearer so: it is part of an index's key, of histories and of logs.
fn is_subject(name: &str) -> bool {
    (1..=SUBJECT_BYTES).contains(&name.len()) && !name.chars().any(char::is_control)
}

/// Whether a tenant may have this name: it becomes part of object keys.
fn is_tenant(name: &str) -> bool {
    (1..=63).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}
