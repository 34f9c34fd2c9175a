//! Who is asking: a bearer token turned into a caller, or nobody asked for one.

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
        let (prefixes, names): (Vec<&String>, Vec<&String>) = self.topics.iter().partition(|topic| topic.ends_with('*'));
        (names.into_iter().cloned().collect(), prefixes.into_iter().map(|topic| topic.trim_end_matches('*').to_owned()).collect())
    }
}

/// Why nobody was let in.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("no bearer token")]
    Unauthenticated,
    #[error("{0}")]
    Invalid(&'static str),
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
    /// `LFS_BROKER_JWT_ISSUER`.
    pub issuer: Option<String>,
    /// `LFS_BROKER_JWT_AUDIENCE`.
    pub audience: Option<String>,
}

/// Settings that let nobody in.
#[derive(Debug, thiserror::Error)]
pub enum BadSettings {
    /// `jwt` without a key.
    #[error("auth mode jwt needs LFS_BROKER_JWT_HS256_SECRET or LFS_BROKER_JWT_PUBLIC_KEY_FILE")]
    NoKey,
    /// `jwt` with an issuer or audience missing.
    #[error("auth mode jwt needs LFS_BROKER_JWT_ISSUER and LFS_BROKER_JWT_AUDIENCE")]
    NoIssuer,
    /// A secret that can be guessed.
    #[error("LFS_BROKER_JWT_HS256_SECRET has {0} bytes, at least 32 are needed (RFC 7518, section 3.2)")]
    ShortSecret(usize),
    /// A PEM that is not a public key.
    #[error("the public key cannot be read: {0}")]
    Pem(jsonwebtoken::errors::Error),
}

/// Turns a request's `Authorization` into a caller.
pub(crate) enum Auth {
    None,
    Jwt { key: jsonwebtoken::DecodingKey, validation: Box<jsonwebtoken::Validation> },
}

/// The claims of a token.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub(crate) struct Claims {
    pub(crate) sub: String,
    pub(crate) tenant: String,
    pub(crate) scope: String,
    #[serde(default)]
    pub(crate) topics: Vec<String>,
    pub(crate) iss: String,
    pub(crate) aud: String,
    pub(crate) exp: u64,
}

impl Auth {
    /// Checks the settings.
    pub(crate) fn new(settings: &Settings) -> Result<Self, BadSettings> {
        use jsonwebtoken::{Algorithm, DecodingKey, Validation};
        if settings.mode == Mode::None {
            return Ok(Self::None);
        }
        let (key, algorithm) = match (&settings.hs256_secret, &settings.public_key_pem) {
            (Some(secret), _) if secret.len() < 32 => return Err(BadSettings::ShortSecret(secret.len())),
            (Some(secret), _) => (DecodingKey::from_secret(secret.as_bytes()), Algorithm::HS256),
            (None, Some(pem)) => public_key(pem)?,
            (None, None) => return Err(BadSettings::NoKey),
        };
        let (Some(issuer), Some(audience)) = (&settings.issuer, &settings.audience) else { return Err(BadSettings::NoIssuer) };
        let mut validation = Validation::new(algorithm);
        validation.leeway = 30;
        validation.validate_nbf = true;
        validation.set_issuer(&[issuer]);
        validation.set_audience(&[audience]);
        // Without this an absent claim is not checked at all.
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        Ok(Self::Jwt { key, validation: Box::new(validation) })
    }

    /// Who sends this `Authorization`.
    pub(crate) fn caller(&self, authorization: Option<&str>) -> Result<Caller, Error> {
        let Self::Jwt { key, validation } = self else { return Ok(Caller::anyone()) };
        let authorization = authorization.ok_or(Error::Unauthenticated)?;
        let (scheme, token) = authorization.split_once(' ').ok_or(Error::Unauthenticated)?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Err(Error::Unauthenticated);
        }
        let claims = match jsonwebtoken::decode::<Claims>(token.trim(), key, validation) {
            Ok(data) => data.claims,
            Err(error) => {
                tracing::info!(%error, "refused a token");
                return Err(Error::Invalid("the token is not valid here"));
            }
        };
        if !is_tenant(&claims.tenant) || claims.sub.is_empty() {
            return Err(Error::Invalid("the token's tenant or sub has the wrong shape"));
        }
        let scopes = claims.scope.split(' ').filter_map(Scope::named);
        Ok(Caller { scopes: scopes.collect(), tenant: claims.tenant, subject: claims.sub, topics: claims.topics })
    }
}

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

/// Makes a token that a broker with the same settings accepts.
///
/// # Errors
/// When there is no secret to sign with, or no broker would accept the outcome.
pub fn issue(settings: &Settings, grant: Grant) -> Result<String, NotIssued> {
    use jsonwebtoken::{EncodingKey, Header};
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
    let claims = Claims { sub, tenant, scope: scopes.join(" "), topics, iss, aud, exp };
    Ok(jsonwebtoken::encode(&Header::default(), &claims, &EncodingKey::from_secret(secret.as_bytes()))?)
}

/// Whether a tenant may have this name: it becomes part of object keys.
fn is_tenant(name: &str) -> bool {
    (1..=63).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}

fn public_key(pem: &str) -> Result<(jsonwebtoken::DecodingKey, jsonwebtoken::Algorithm), BadSettings> {
    use jsonwebtoken::{Algorithm, DecodingKey};
    let bytes = pem.as_bytes();
    // The key's own kind pins the one algorithm that is accepted.
    DecodingKey::from_rsa_pem(bytes)
        .map(|key| (key, Algorithm::RS256))
        .or_else(|_| DecodingKey::from_ec_pem(bytes).map(|key| (key, Algorithm::ES256)))
        .or_else(|_| DecodingKey::from_ed_pem(bytes).map(|key| (key, Algorithm::EdDSA)))
        .map_err(BadSettings::Pem)
}
