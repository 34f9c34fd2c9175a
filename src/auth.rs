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
        let tenant = claims.tenant.as_str();
        let sound = (1..=63).contains(&tenant.len())
            && tenant.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
        if !sound || claims.sub.is_empty() {
            return Err(Error::Invalid("the token's tenant or sub has the wrong shape"));
        }
        let scopes = claims.scope.split(' ').filter_map(|scope| match scope {
            "lfs:write" => Some(Scope::Write),
            "lfs:read" => Some(Scope::Read),
            "lfs:admin" => Some(Scope::Admin),
            _ => None,
        });
        Ok(Caller { scopes: scopes.collect(), tenant: claims.tenant, subject: claims.sub, topics: claims.topics })
    }
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
