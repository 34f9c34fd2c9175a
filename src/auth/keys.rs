//! Keys, each with the algorithms that it is good for and the rules that its tokens are held to.

use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyAlgorithm, KeyOperations, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode};
use serde::de::DeserializeOwned;

use super::BadSettings;

/// Seconds by which an issuer's clock may be ahead of ours: a token that was just made is let in.
const LEEWAY: u64 = 30;
/// The shortest RSA modulus, in bytes: 2,048 bits (RFC 7518, section 3.3).
const RSA_BYTES: usize = 256;

/// What every token must say, whoever signed it.
#[derive(Clone)]
pub(super) struct Rules {
    pub(super) issuer: String,
    pub(super) audience: String,
}

/// A key that proves tokens.
pub(crate) struct Key {
    key: DecodingKey,
    validation: Validation,
}

impl Key {
    fn new(key: DecodingKey, algorithms: &[Algorithm], rules: &Rules) -> Self {
        let algorithms = algorithms.to_vec();
        let mut validation = Validation {
            algorithms,
            leeway: LEEWAY,
            validate_nbf: true,
            // Takes the leeway back where a token ends: "on or after" that time it is over (RFC 7519, section 4.1.4).
            reject_tokens_expiring_in_less_than: LEEWAY + 1,
            ..Validation::default()
        };
        validation.set_issuer(&[&rules.issuer]);
        validation.set_audience(&[&rules.audience]);
        // Without this an absent claim is not checked at all.
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        Self { key, validation }
    }

    pub(super) fn of_secret(secret: &str, rules: &Rules) -> Result<Self, BadSettings> {
        if secret.len() < 32 {
            return Err(BadSettings::ShortSecret(secret.len()));
        }
        Ok(Self::new(DecodingKey::from_secret(secret.as_bytes()), &[Algorithm::HS256], rules))
    }

    pub(super) fn of_pem(pem: &str, rules: &Rules) -> Result<Self, BadSettings> {
        let bytes = pem.as_bytes();
        // The key's own kind pins the algorithms.
        let (key, algorithms): (_, &[_]) = DecodingKey::from_rsa_pem(bytes)
            .map(|key| (key, RSA))
            .or_else(|_| DecodingKey::from_ec_pem(bytes).map(|key| (key, P256)))
            .or_else(|_| DecodingKey::from_ed_pem(bytes).map(|key| (key, ED25519)))
            .map_err(BadSettings::Pem)?;
        Ok(Self::new(key, algorithms, rules))
    }

    /// `None` for a key that signs no token here: of another kind, for another use, too short, or a shared secret, which
    /// has no place in a public set.
    pub(super) fn of_jwk(jwk: &Jwk, rules: &Rules) -> Option<Self> {
        if !matches!(jwk.common.public_key_use, None | Some(PublicKeyUse::Signature)) {
            return None;
        }
        if jwk.common.key_operations.as_ref().is_some_and(|operations| !operations.contains(&KeyOperations::Verify)) {
            return None;
        }
        let kind = match &jwk.algorithm {
            AlgorithmParameters::RSA(rsa) if modulus_bytes(&rsa.n) >= RSA_BYTES => RSA,
            AlgorithmParameters::EllipticCurve(ec) if ec.curve == EllipticCurve::P256 => P256,
            AlgorithmParameters::OctetKeyPair(pair) if pair.curve == EllipticCurve::Ed25519 => ED25519,
            _ => return None,
        };
        let algorithms: Vec<Algorithm> = match jwk.common.key_algorithm {
            None => kind.to_vec(),
            Some(only) => kind.iter().copied().filter(|algorithm| KeyAlgorithm::from(*algorithm) == only).collect(),
        };
        let key = DecodingKey::from_jwk(jwk).ok()?;
        (!algorithms.is_empty()).then(|| Self::new(key, &algorithms, rules))
    }

    /// Whether a token of this algorithm may be of this key.
    pub(super) fn is_for(&self, algorithm: Algorithm) -> bool {
        self.validation.algorithms.contains(&algorithm)
    }

    pub(super) fn read<T: DeserializeOwned + Clone>(&self, token: &str) -> Result<T, jsonwebtoken::errors::Error> {
        Ok(decode::<T>(token, &self.key, &self.validation)?.claims)
    }
}

const RSA: &[Algorithm] = &[Algorithm::RS256, Algorithm::PS256];
const P256: &[Algorithm] = &[Algorithm::ES256];
const ED25519: &[Algorithm] = &[Algorithm::EdDSA];

/// The length of a modulus in base64url, in bytes.
fn modulus_bytes(base64url: &str) -> usize {
    base64url.trim_end_matches('=').len() * 3 / 4
}
