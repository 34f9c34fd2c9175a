//! Resolve a pointer: the record's value in, a signed GET out.

use std::time::Duration;

use lfs_broker_client::api::{ResolveAnswer, ResolveOptions, Resolved, Validated};
use lfs_broker_client::pointer::Pointer;

use super::open::request;
use super::{Broker, Error};
use crate::auth::Caller;
use crate::objects::Place;
use crate::policy;
use crate::session::{Proof, State};

impl Broker {
    /// Checks a pointer and the object that it names, and signs a GET of it.
    ///
    /// No session is needed: rows are retired, and other producers' pointers resolve too. What the pointer says is
    /// only believed as far as the caller's own tenant, topics and the policies' buckets and prefixes go.
    pub(crate) async fn resolve(&self, caller: &Caller, value: &[u8], options: &ResolveOptions) -> Result<ResolveAnswer, Error> {
        let pointer = Pointer::parse(value).map_err(|error| Error::PointerInvalid(error.to_string()))?;
        let policy = self.allow(caller, &pointer).await?;
        if pointer.size > policy.max_bytes {
            let detail = format!("the pointer says {} bytes, the topic allows {}", pointer.size, policy.max_bytes);
            return Err(Error::PointerInvalid(detail));
        }
        let place = Place { bucket: pointer.bucket.clone(), key: pointer.key.clone() };
        let version_id = options.version_id.as_deref();
        let found = self.objects.head(&place, version_id).await?.ok_or(Error::ObjectGone)?;
        if found.size_bytes != pointer.size {
            return Err(Error::PointerSize { promised: pointer.size, found: found.size_bytes });
        }
        let session = self.store.session_of_object(&place.bucket, &place.key).await?;
        let integrity = session.as_ref().and_then(|session| match &session.state {
            State::Verified(Proof { integrity, .. }) | State::Published(Proof { integrity, .. }, _) => Some(*integrity),
            _ => None,
        });
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

    /// Whether a policy covers the pointer's bucket and prefix, and the caller its tenant and topic.
    async fn allow(&self, caller: &Caller, pointer: &Pointer) -> Result<lfs_broker_client::api::Policy, Error> {
        let outside = || Error::PointerForbidden("the pointer is outside the buckets and prefixes of the policies");
        // The topic is in the key, behind a prefix that only the topic's policy knows: try each place it can be.
        let segments: Vec<&str> = pointer.key.split('/').collect();
        for lfs in segments.iter().enumerate().filter(|(_, segment)| **segment == "lfs").map(|(index, _)| index) {
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
            return Ok(policy);
        }
        Err(outside())
    }
}
