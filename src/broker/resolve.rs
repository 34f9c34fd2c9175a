//! Resolve a pointer: takes the value of a Kafka record, returns a signed GET.

use std::time::Duration;

use lfs_broker_client::api::{Policy, ResolveAnswer, ResolveOptions, Resolved, Validated};
use lfs_broker_client::pointer::Pointer;

use super::open::signed_request;
use super::view::pointer as stored_pointer;
use super::{Broker, Error};
use crate::auth::Caller;
use crate::completion::still_verified;
use crate::objects::ObjectLocation;
use crate::policy::{self, MAX_OBJECT_KEY_BYTES};

/// The most `lfs` segments of an object key that are tried as the segment after the topic. Each costs a query, and few
/// prefixes have even one.
const MAX_CANDIDATES: usize = 8;

impl Broker {
    /// Checks a pointer and its object, and signs a GET of the object.
    ///
    /// No session is needed: old rows are deleted, and pointers of other producers resolve too. The pointer is trusted only
    /// within the caller's tenant and topics, and within the buckets and prefixes of the policies.
    pub(crate) async fn resolve(&self, caller: &Caller, value: &[u8], options: &ResolveOptions) -> Result<ResolveAnswer, Error> {
        let pointer = Pointer::parse_any_order(value).map_err(|error| Error::PointerInvalid(error.to_string()))?;
        // PostgreSQL cannot store a NUL in text, and no S3 store allows it in a key.
        if pointer.bucket.contains('\0') || pointer.key.contains('\0') {
            return Err(Error::PointerInvalid("the pointer's bucket or key has a NUL character".to_owned()));
        }
        let (topic, policy) = self.authorize_pointer(caller, &pointer).await?;
        if options.topic.as_ref().is_some_and(|read_from| *read_from != topic) {
            return Err(Error::PointerForbidden("the object belongs to another topic than the record it was read from"));
        }
        let location = ObjectLocation { bucket: pointer.bucket.clone(), key: pointer.key.clone() };
        let session = self.store.session_of_object(&location.bucket, &location.key).await?;
        // A session keeps the limits that applied when it was opened.
        if (options.validate || session.is_none()) && pointer.size > policy.max_bytes {
            let detail = format!("the pointer declares {} bytes, the topic allows {}", pointer.size, policy.max_bytes);
            return Err(Error::PointerInvalid(detail));
        }
        let verified = session.as_ref().and_then(|session| Some((session, session.state.verification()?)));
        // A pointer refers to the verified version, even if the bucket has a later one.
        let version_id =
            options.version_id.as_deref().or(verified.and_then(|(_, verification)| verification.version_id.as_deref()));
        let found = self.objects.head_pointer_target(&location, version_id).await?.ok_or(Error::ObjectGone)?;
        if found.size_bytes != pointer.size {
            return Err(Error::PointerSize { declared: pointer.size, found: found.size_bytes });
        }
        let integrity = match verified {
            Some((session, verification)) => match has_verified_digest(&pointer, &stored_pointer(session, verification)?)? {
                true => still_verified(&self.store, session, verification, &found).await?.ok(),
                false => None,
            },
            None => None,
        };
        if options.validate {
            return Ok(ResolveAnswer::Validated(Validated { valid: true, size: pointer.size, integrity }));
        }
        let filename = session.as_ref().and_then(|session| session.spec.filename.clone());
        let lifetime = Duration::from_secs(policy.url_seconds);
        let now = self.store.now().await?;
        let content_type = pointer.content_type.as_deref();
        let signed = self.objects.presign_get(&location, version_id, filename.as_deref(), content_type, lifetime).await?;
        Ok(ResolveAnswer::Resolved(Resolved {
            request: signed_request(signed, now),
            size: pointer.size,
            sha256: pointer.sha256,
            content_type: pointer.content_type,
            filename,
            integrity,
            upload_id: session.map(|session| session.id),
        }))
    }

    /// The topic of the pointer's object, and its policy. Fails unless the policy covers the bucket and prefix, the caller
    /// may use the topic, and the object belongs to the caller's tenant.
    async fn authorize_pointer(&self, caller: &Caller, pointer: &Pointer) -> Result<(String, Policy), Error> {
        let outside = || Error::PointerForbidden("the pointer is outside the buckets and prefixes of the policies");
        if pointer.key.len() > MAX_OBJECT_KEY_BYTES {
            return Err(outside());
        }
        // The key contains the topic after a prefix, and only the topic's policy has the prefix. So every possible position
        // is tried.
        let segments: Vec<&str> = pointer.key.split('/').collect();
        let candidates = segments.iter().enumerate().filter(|(_, segment)| **segment == "lfs").map(|(index, _)| index);
        for lfs in candidates.take(MAX_CANDIDATES) {
            let Some(topic) = lfs.checked_sub(1).map(|index| segments[index]).filter(|topic| policy::is_topic(topic)) else {
                continue;
            };
            let policy = self.policy_of(topic).await?;
            let Some((tenant, named)) = policy::parse_object_key(policy.prefix.as_deref(), &pointer.key) else { continue };
            let bucket = policy.bucket.as_deref().or(self.objects.default_bucket());
            if named != topic || bucket != Some(pointer.bucket.as_str()) {
                continue;
            }
            if !caller.is_admin() && (tenant != caller.tenant || !caller.may_use(topic)) {
                return Err(Error::PointerForbidden(
                    "the pointer belongs to another tenant, or to a topic that the token does not allow",
                ));
            }
            return Ok((topic.to_owned(), policy));
        }
        Err(outside())
    }
}

/// Whether a pointer has the digest of the verified pointer. `false` if it has no digest, or one of another algorithm.
fn has_verified_digest(pointer: &Pointer, verified: &Pointer) -> Result<bool, Error> {
    match (pointer.digest(), verified.digest()) {
        (Some(declared), Some(verified)) if declared.algorithm == verified.algorithm && declared != verified => {
            Err(Error::PointerChecksum { declared: format!("{declared:?}"), found: format!("{verified:?}") })
        }
        (declared, verified) => Ok(declared == verified),
    }
}
