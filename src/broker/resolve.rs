//! Resolve a pointer: the record's value in, a signed GET out.

use std::time::Duration;

use lfs_broker_client::api::{Policy, ResolveAnswer, ResolveOptions, Resolved, Validated};
use lfs_broker_client::pointer::Pointer;

use super::complete::pointer as stored_pointer;
use super::open::request;
use super::{Broker, Error};
use crate::auth::Caller;
use crate::finish::still_proved;
use crate::objects::Place;
use crate::policy::{self, MAX_OBJECT_KEY_BYTES};

/// So many segments `lfs` of a key are looked at; each costs a query, and a prefix has hardly one.
const PLACES: usize = 8;

impl Broker {
    /// Checks a pointer and the object that it names, and signs a GET of it.
    ///
    /// No session is needed: rows are retired, and other producers' pointers resolve too. What the pointer says is
    /// only believed as far as the caller's own tenant, topics and the policies' buckets and prefixes go.
    pub(crate) async fn resolve(&self, caller: &Caller, value: &[u8], options: &ResolveOptions) -> Result<ResolveAnswer, Error> {
        let pointer = Pointer::parse_any_order(value).map_err(|error| Error::PointerInvalid(error.to_string()))?;
        // PostgreSQL has no text with it, and no store a key.
        if pointer.bucket.contains('\0') || pointer.key.contains('\0') {
            return Err(Error::PointerInvalid("the pointer's bucket or key has a NUL character".to_owned()));
        }
        let (topic, policy) = self.allow(caller, &pointer).await?;
        if options.topic.as_ref().is_some_and(|read_from| *read_from != topic) {
            return Err(Error::PointerForbidden("the object belongs to another topic than the pointer was read from"));
        }
        let place = Place { bucket: pointer.bucket.clone(), key: pointer.key.clone() };
        let session = self.store.session_of_object(&place.bucket, &place.key).await?;
        // A session keeps the limits that it was opened under.
        if (options.validate || session.is_none()) && pointer.size > policy.max_bytes {
            let detail = format!("the pointer says {} bytes, the topic allows {}", pointer.size, policy.max_bytes);
            return Err(Error::PointerInvalid(detail));
        }
        let proved = session.as_ref().and_then(|session| Some((session, session.state.proof()?)));
        // A pointer means the version that was proved, also where a later one hides it.
        let version_id = options.version_id.as_deref().or(proved.and_then(|(_, proof)| proof.version_id.as_deref()));
        let found = self.objects.head_of_pointer(&place, version_id).await?.ok_or(Error::ObjectGone)?;
        if found.size_bytes != pointer.size {
            return Err(Error::PointerSize { promised: pointer.size, found: found.size_bytes });
        }
        let integrity = match proved {
            Some((session, proof)) => match says_the_same(&pointer, &stored_pointer(session, proof)?)? {
                true => still_proved(&self.store, session, proof, &found).await?.ok(),
                false => None,
            },
            None => None,
        };
        if options.validate {
            return Ok(ResolveAnswer::Validated(Validated { valid: true, size: pointer.size, integrity }));
        }
        let filename = session.as_ref().and_then(|session| session.promise.filename.clone());
        let life = Duration::from_secs(policy.url_seconds);
        let now = self.store.now().await?;
        let content_type = pointer.content_type.as_deref();
        let signed = self.objects.sign_get(&place, version_id, filename.as_deref(), content_type, life).await?;
        Ok(ResolveAnswer::Resolved(Resolved {
            request: request(signed, now),
            size: pointer.size,
            sha256: pointer.sha256,
            content_type: pointer.content_type,
            filename,
            integrity,
            upload_id: session.map(|session| session.id),
        }))
    }

    /// The topic that the pointer's object belongs to, and its policy, which covers the bucket and the prefix. The caller may
    /// use that topic, and the tenant is the caller's.
    async fn allow(&self, caller: &Caller, pointer: &Pointer) -> Result<(String, Policy), Error> {
        let outside = || Error::PointerForbidden("the pointer is outside the buckets and prefixes of the policies");
        if pointer.key.len() > MAX_OBJECT_KEY_BYTES {
            return Err(outside());
        }
        // The topic is in the key, behind a prefix that only the topic's policy knows: try the places where it can be.
        let segments: Vec<&str> = pointer.key.split('/').collect();
        let places = segments.iter().enumerate().filter(|(_, segment)| **segment == "lfs").map(|(index, _)| index);
        for lfs in places.take(PLACES) {
            let Some(topic) = lfs.checked_sub(1).map(|index| segments[index]).filter(|topic| policy::is_topic(topic)) else {
                continue;
            };
            let policy = self.policy_of(topic).await?;
            let Some((tenant, named)) = policy::owner_of(policy.prefix.as_deref(), &pointer.key) else { continue };
            let bucket = policy.bucket.as_deref().or(self.objects.default_bucket());
            if named != topic || bucket != Some(pointer.bucket.as_str()) {
                continue;
            }
            if !caller.is_admin() && (tenant != caller.tenant || !caller.may_use(topic)) {
                return Err(Error::PointerForbidden(
                    "the pointer is another tenant's, or of a topic that the token does not name",
                ));
            }
            return Ok((topic.to_owned(), policy));
        }
        Err(outside())
    }
}

/// Whether a pointer names the bytes that were proved; `false` where it says nothing of them, or in another algorithm.
fn says_the_same(pointer: &Pointer, proved: &Pointer) -> Result<bool, Error> {
    match (pointer.digest(), proved.digest()) {
        (Some(said), Some(proved)) if said.algorithm == proved.algorithm && said != proved => {
            Err(Error::PointerChecksum { promised: format!("{said:?}"), found: format!("{proved:?}") })
        }
        (said, proved) => Ok(said == proved),
    }
}
