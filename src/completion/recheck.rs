//! Checks the object of an upload that was verified before.

use lfs_broker_client::api::Integrity;

use crate::session::{Object, Session, SessionError, Verification};
use crate::store::{self, Store};

/// Rechecks the object of a verified upload ([`Session::recheck`]). The part hashes are loaded only if the object's ETag
/// has changed.
pub(crate) async fn still_verified(
    store: &Store,
    session: &Session,
    verification: &Verification,
    found: &Object,
) -> Result<Result<Integrity, SessionError>, store::Error> {
    let parts = match session.spec.layout.has_part_hashes() && verification.etag != found.etag {
        true => store.part_hashes(session.id).await?.into_iter().map(|(_, sha256)| sha256).collect(),
        false => Vec::new(),
    };
    Ok(session.recheck(verification, found, &parts))
}
