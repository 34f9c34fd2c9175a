//! Verification keys: each has its allowed algorithms and the claims that its tokens must carry.

use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyAlgorithm, KeyOperations, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode};
use serde::de::DeserializeOwned;

use super::BadSettings;

/// How far an issuer's clock may be ahead of the broker's, so that a new token is accepted at once.
const LEEWAY_SECONDS: u64 = 30;
/// The shortest RSA modulus, in bytes: 2,048 bits (RFC 7518, section 3.3).
const MIN_RSA_BYTES: usize = 256;

/// The `iss` and `aud` values that every token must have.
#[derive(Clone)]
pub(super) struct RequiredClaims {
    pub(super) issuer: String,
    pub(super) audience: String,
}

/// A key that verifies token signatures.
pub(crate) struct VerificationKey {
    key: DecodingKey,
    validation: Validation,
}

impl VerificationKey {
    fn new(key: DecodingKey, algorithms: &[Algorithm], required: &RequiredClaims) -> Self {
        let algorithms = algorithms.to_vec();
        let mut validation = Validation {
            algorithms,
            leeway: LEEWAY_SECONDS,
            validate_nbf: true,
            // Removes the leeway from `exp`: a token is not valid "on or after" that time (RFC 7519, section 4.1.4).
            reject_tokens_expiring_in_less_than: LEEWAY_SECONDS + 1,
            ..Validation::default()
        };
        validation.set_issuer(&[&required.issuer]);
        validation.set_audience(&[&required.audience]);
        // Without this list, an absent claim is not checked.
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        Self { key, validation }
    }

    pub(super) fn from_secret(secret: &str, required: &RequiredClaims) -> Result<Self, BadSettings> {
        if secret.len() < 32 {
            return Err(BadSettings::ShortSecret(secret.len()));
        }
        Ok(Self::new(DecodingKey::from_secret(secret.as_bytes()), &[Algorithm::HS256], required))
    }

    pub(super) fn from_pem(pem: &str, required: &RequiredClaims) -> Result<Self, BadSettings> {
        let bytes = pem.as_bytes();
        // The key type decides which algorithms are allowed.
        let (key, algorithms): (_, &[_]) = DecodingKey::from_rsa_pem(bytes)
            .map(|key| (key, RSA_ALGORITHMS))
            .or_else(|_| DecodingKey::from_ec_pem(bytes).map(|key| (key, P256_ALGORITHMS)))
            .or_else(|_| DecodingKey::from_ed_pem(bytes).map(|key| (key, ED25519_ALGORITHMS)))
            .map_err(BadSettings::Pem)?;
        Ok(Self::new(key, algorithms, required))
    }

    /// `None` for a key that must not verify tokens: a wrong type or use, an RSA key that is too short, or a shared secret,
    /// which does not belong in a public key set.
    pub(super) fn from_jwk(jwk: &Jwk, required: &RequiredClaims) -> Option<Self> {
        if !matches!(jwk.common.public_key_use, None | Some(PublicKeyUse::Signature)) {
            return None;
        }
        if jwk.common.key_operations.as_ref().is_some_and(|operations| !operations.contains(&KeyOperations::Verify)) {
            return None;
        }
        let allowed = match &jwk.algorithm {
            AlgorithmParameters::RSA(rsa) if modulus_bytes(&rsa.n) >= MIN_RSA_BYTES => RSA_ALGORITHMS,
            AlgorithmParameters::EllipticCurve(ec) if ec.curve == EllipticCurve::P256 => P256_ALGORITHMS,
            AlgorithmParameters::OctetKeyPair(okp) if okp.curve == EllipticCurve::Ed25519 => ED25519_ALGORITHMS,
            _ => return None,
        };
        let algorithms: Vec<Algorithm> = match jwk.common.key_algorithm {
            None => allowed.to_vec(),
            Some(only) => allowed.iter().copied().filter(|algorithm| KeyAlgorithm::from(*algorithm) == only).collect(),
        };
        let key = DecodingKey::from_jwk(jwk).ok()?;
        (!algorithms.is_empty()).then(|| Self::new(key, &algorithms, required))
    }

    /// Whether this key may verify tokens that use this algorithm.
    pub(super) fn supports(&self, algorithm: Algorithm) -> bool {
        self.validation.algorithms.contains(&algorithm)
    }

    pub(super) fn verify<T: DeserializeOwned + Clone>(&self, token: &str) -> Result<T, jsonwebtoken::errors::Error> {
        Ok(decode::<T>(token, &self.key, &self.validation)?.claims)
    }
}

const RSA_ALGORITHMS: &[Algorithm] = &[Algorithm::RS256, Algorithm::PS256];
const P256_ALGORITHMS: &[Algorithm] = &[Algorithm::ES256];
const ED25519_ALGORITHMS: &[Algorithm] = &[Algorithm::EdDSA];

/// The length in bytes of a modulus that is written in base64url.
fn modulus_bytes(base64url: &str) -> usize {
    base64url.trim_end_matches('=').len() * 3 / 4
}
