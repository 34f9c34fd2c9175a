//! The designs: the current one keeps every property, and the same check refutes each rejected one.

use crate::checker::{check, refute};
use crate::completion::{self, Completion, Layout, NOTHING_LEFT, ONE_END, ONLY_WRONG_REJECTED, SAME_BYTES};
use crate::publication::{self, IN_ORDER, NEVER_LOST, NEVER_TWICE, PUBLISHED_IS_IN_KAFKA, Publication, Resolution};

/// The current design with one change, within bounds in which each rejected design fails.
fn publication(keys: &'static [u8], change: impl Fn(&mut publication::Design)) -> Publication {
    let mut model = Publication::current(keys, 1, 2);
    change(&mut model.design);
    model
}

/// The design without a safeguard that would hide the missing one within these bounds: of the pointers that the marker
/// lists, only claimed rows are marked published.
fn marks_claimed_only(mut model: Publication) -> Publication {
    model.design.marks_all_listed = false;
    model
}

fn completion(layout: Layout, change: impl Fn(&mut completion::Design)) -> Completion {
    let mut model = Completion::current(layout, 2, 1, 1);
    change(&mut model.design);
    model
}

#[test]
fn pointers_of_one_key_are_published_once_and_in_order() {
    check("one key", Publication::current(b"aa", 2, 2));
    check("one key, many faults", Publication::current(b"aa", 1, 3));
}

#[test]
fn pointers_of_two_keys_are_published_once_and_in_order() {
    check("two keys", Publication::current(b"ab", 1, 2));
    check("two keys, three pointers", Publication::current(b"aab", 1, 1));
}

#[test]
fn pointers_are_published_once_when_the_database_is_restored_from_a_backup() {
    check("a backup", Publication::current(b"aa", 0, 1).with_backup());
    check("a backup and a crash", Publication::current(b"aa", 1, 0).with_backup());
}

#[test]
fn pointers_are_published_once_when_their_records_are_removed_before_the_lookup() {
    check("a removed record", Publication::current(b"aa", 1, 2).with_removals(1));
    check("removed records of two keys", Publication::current(b"ab", 1, 1).with_removals(2));
}

#[test]
fn a_marker_that_is_read_before_its_transaction_is_committed_loses_a_pointer() {
    let design = publication(b"a", |design| design.reads_committed_marker = false);
    refute("a marker sent before the transaction", Publication { faults: 0, ..design }, PUBLISHED_IS_IN_KAFKA);
}

#[test]
fn a_marker_of_an_aborted_transaction_loses_a_pointer() {
    let design = publication(b"a", |design| design.reads_committed_marker = false);
    refute("an aborted marker", Publication { crashes: 0, faults: 2, ..design }, PUBLISHED_IS_IN_KAFKA);
}

#[test]
fn sending_a_listed_pointer_again_because_its_topic_lacks_the_record_publishes_twice() {
    let design = publication(b"a", |design| design.trusts_marker_without_record = false);
    refute("trusts the topic", Publication { faults: 0, ..design }.with_removals(1), NEVER_TWICE);
}

#[test]
fn a_relay_that_does_not_check_its_batch_number_publishes_twice_when_the_database_is_restored() {
    let design = publication(b"aa", |design| design.checks_batch_number = false);
    refute("no check of the batch number", Publication { crashes: 0, faults: 0, ..design }.with_backup(), NEVER_TWICE);
}

#[test]
fn a_relay_that_claims_beside_unresolved_claims_loses_a_pointer_when_the_database_is_restored() {
    let design = publication(b"aa", |design| design.claims_only_when_resolved = false);
    refute("claims beside unresolved claims", Publication { crashes: 0, faults: 0, ..design }.with_backup(), NEVER_LOST);
}

#[test]
fn a_relay_that_continues_behind_the_marker_publishes_twice_when_the_database_is_restored() {
    let design = publication(b"aa", |design| design.refuses_when_behind_marker = false);
    refute("continues behind the marker", Publication { crashes: 0, faults: 0, ..design }.with_backup(), NEVER_TWICE);
}

#[test]
fn an_epoch_that_is_reused_after_the_database_is_restored_publishes_twice() {
    let design = publication(b"a", |design| design.has_unique_epochs = false);
    refute("reused epochs", marks_claimed_only(Publication { crashes: 0, faults: 1, ..design }).with_backup(), NEVER_TWICE);
}

#[test]
fn releasing_a_published_row_whose_publication_was_lost_publishes_twice() {
    let design = publication(b"a", |design| design.keeps_claims_of_published = false);
    refute("releases published rows", Publication { faults: 0, ..design }.with_backup(), NEVER_TWICE);
}

#[test]
fn deferring_a_row_by_its_claim_alone_publishes_twice_when_the_database_is_restored() {
    let design = publication(b"a", |design| design.only_owner_defers = false);
    refute("defers by claim alone", marks_claimed_only(Publication { faults: 1, ..design }).with_backup(), NEVER_TWICE);
}

#[test]
fn an_audit_that_trusts_a_marker_newer_than_the_records_it_has_read_publishes_twice() {
    let design = publication(b"aa", |design| design.audits_from_first_marker = false);
    refute("a newer marker", marks_claimed_only(Publication { faults: 0, ..design }).with_backup(), NEVER_TWICE);
}

#[test]
fn a_single_put_is_queued_as_verified_or_leaves_nothing() {
    check("single PUT", Completion::current(Layout::Single, 2, 2, 2));
}

#[test]
fn an_object_that_is_read_back_is_queued_as_verified_or_leaves_nothing() {
    check("read back", Completion::current(Layout::ReadBack, 2, 1, 2));
}

#[test]
fn a_multipart_upload_is_queued_as_verified_or_leaves_nothing() {
    check("multipart", Completion::current(Layout::Multipart, 2, 1, 1));
}

#[test]
fn without_fence_and_marker_pointers_are_published_twice() {
    let neither = |design: &mut publication::Design| {
        design.fences_old_owner = false;
        design.resolution = Resolution::NotRead;
    };
    refute("neither fence nor marker", publication(b"aa", neither), NEVER_TWICE);
}

#[test]
fn a_fence_without_reading_the_marker_publishes_twice() {
    let design = publication(b"aa", |design| design.resolution = Resolution::NotRead);
    refute("fence without marker", design, NEVER_TWICE);
}

#[test]
fn reading_the_marker_without_a_fence_publishes_twice() {
    refute("marker without fence", publication(b"aa", |design| design.fences_old_owner = false), NEVER_TWICE);
}

#[test]
fn a_shard_that_is_given_back_during_its_batch_is_safe_because_the_next_owner_fences() {
    check("given back during a batch", publication(b"aa", |design| design.gives_back_after_batch = false));
}

#[test]
fn a_shard_that_is_given_back_during_its_batch_publishes_twice_without_a_fence() {
    let unsafe_handover = |design: &mut publication::Design| {
        design.gives_back_after_batch = false;
        design.fences_old_owner = false;
    };
    let design = publication(b"a", unsafe_handover);
    refute("given back without a fence", Publication { crashes: 0, faults: 1, ..design }, NEVER_TWICE);
}

#[test]
fn two_relays_that_skip_each_others_rows_change_the_order() {
    let skip_locked = |design: &mut publication::Design| {
        design.has_owner = false;
        design.claims_only_when_resolved = false;
        design.fences_old_owner = false;
    };
    refute("skip locked", Publication { crashes: 0, faults: 0, ..publication(b"aa", skip_locked) }, IN_ORDER);
}

#[test]
fn a_cursor_loses_a_pointer_that_is_committed_late() {
    refute("cursor", publication(b"ab", |design| design.has_cursor = true), NEVER_LOST);
}

#[test]
fn a_batch_before_the_previous_one_is_resolved_publishes_twice() {
    let unresolved = |design: &mut publication::Design| {
        design.resolves_first = false;
        design.claims_only_when_resolved = false;
    };
    refute("unresolved batch", publication(b"aa", unresolved), NEVER_TWICE);
}

#[test]
fn a_marker_with_only_a_batch_number_loses_an_aborted_batch() {
    let by_number = |design: &mut publication::Design| {
        design.resolves_first = false;
        design.claims_only_when_resolved = false;
        design.resolution = Resolution::ByNumber;
    };
    refute("marker by number", publication(b"aa", by_number), PUBLISHED_IS_IN_KAFKA);
}

#[test]
fn a_release_by_a_former_owner_publishes_twice() {
    let design = publication(b"aa", |design| design.only_owner_releases = false);
    refute("release by a former owner", marks_claimed_only(design), NEVER_TWICE);
}

#[test]
fn a_deferral_by_a_former_owner_publishes_twice() {
    let unguarded = |design: &mut publication::Design| {
        design.defers_only_own_claim = false;
        design.only_owner_defers = false;
    };
    refute("deferral by a former owner", marks_claimed_only(publication(b"aa", unguarded)), NEVER_TWICE);
}

#[test]
fn a_deferred_row_that_does_not_block_its_key_changes_the_order() {
    refute("defers one row", publication(b"aa", |design| design.deferral_blocks_key = false), IN_ORDER);
}

#[test]
fn numbers_drawn_without_a_lock_on_their_key_change_the_order() {
    refute("no key lock", publication(b"aa", |design| design.locks_key = false), IN_ORDER);
}

#[test]
fn a_url_without_if_none_match_overwrites_the_verified_object() {
    refute("plain URL", completion(Layout::Single, |design| design.signs_if_none_match = false), SAME_BYTES);
}

#[test]
fn a_transition_without_a_version_check_ends_a_session_twice() {
    refute("no version check", completion(Layout::Single, |design| design.checks_version = false), ONE_END);
}

#[test]
fn a_completion_without_a_claim_that_checks_no_version_ends_a_session_twice() {
    let unchecked = |design: &mut completion::Design| design.checks_version_unclaimed = false;
    refute("no version check without a claim", completion(Layout::Single, unchecked), ONE_END);
}

#[test]
fn a_completion_without_a_claim_that_rejects_what_it_does_not_find_rejects_a_good_upload() {
    let hasty = |design: &mut completion::Design| design.claims_what_is_not_verified = false;
    refute("rejects without a claim", completion(Layout::Single, hasty), ONLY_WRONG_REJECTED);
}

#[test]
fn trusting_the_response_of_a_join_rejects_a_good_upload() {
    refute(
        "trusts the response",
        completion(Layout::Multipart, |design| design.trusts_stored_state = false),
        ONLY_WRONG_REJECTED,
    );
}

#[test]
fn removing_objects_before_ending_the_session_deletes_a_verified_object() {
    refute("removes objects first", completion(Layout::Single, |design| design.ends_session_first = false), SAME_BYTES);
}

#[test]
fn a_single_cleanup_leaves_the_object_of_a_late_put() {
    refute("one cleanup", completion(Layout::Single, |design| design.cleans_up_twice = false), NOTHING_LEFT);
}

#[test]
fn a_single_cleanup_leaves_late_parts_of_a_multipart_upload() {
    refute("one cleanup of parts", completion(Layout::Multipart, |design| design.cleans_up_twice = false), NOTHING_LEFT);
}

#[test]
fn aborting_only_the_upload_of_the_session_leaves_another() {
    refute("aborts one upload", completion(Layout::Multipart, |design| design.aborts_every_upload = false), NOTHING_LEFT);
}
