//! The designs: ours, in which every promise holds, and the broken ones, each of which the same check refutes.

use crate::checker::{check, refute};
use crate::completion::{self, Completion, JUSTLY_REJECTED, Layout, NOTHING_LEFT, ONE_END, SAME_BYTES};
use crate::publication::{self, IN_ORDER, NEVER_LOST, NEVER_TWICE, Publication, Settling, TRULY_MARKED};

/// Ours, with something of it changed, within bounds in which each broken design shows.
fn publication(keys: &'static [u8], change: impl Fn(&mut publication::Design)) -> Publication {
    let mut model = Publication::house(keys, 1, 2);
    change(&mut model.design);
    model
}

/// With one safeguard less, which hides the lack of another within these bounds: of what the marker lists, only stamped
/// rows are taken to be published.
fn only_stamped(mut model: Publication) -> Publication {
    model.design.settles_all_listed = false;
    model
}

fn completion(layout: Layout, change: impl Fn(&mut completion::Design)) -> Completion {
    let mut model = Completion::house(layout, 2, 1, 1);
    change(&mut model.design);
    model
}

#[test]
fn pointers_of_one_key_are_published_once_and_in_order() {
    check("one key", Publication::house(b"aa", 2, 2));
    check("one key, many faults", Publication::house(b"aa", 1, 3));
}

#[test]
fn pointers_of_two_keys_are_published_once_and_in_order() {
    check("two keys", Publication::house(b"ab", 1, 2));
    check("two keys, three pointers", Publication::house(b"aab", 1, 1));
}

#[test]
fn pointers_are_published_once_when_the_database_goes_back_to_a_backup() {
    check("a backup", Publication::house(b"aa", 0, 1).with_backup());
    check("a backup and a crash", Publication::house(b"aa", 1, 0).with_backup());
}

#[test]
fn a_held_shard_that_does_not_ask_for_its_batch_number_publishes_twice_when_the_database_goes_back() {
    let design = publication(b"aa", |design| design.claims_by_number = false);
    refute("no claim by number", Publication { crashes: 0, faults: 0, ..design }.with_backup(), NEVER_TWICE);
}

#[test]
fn a_held_shard_that_does_not_ask_for_unsettled_stamps_loses_a_pointer_when_the_database_goes_back() {
    let design = publication(b"aa", |design| design.claims_when_settled = false);
    refute("no claim of settled rows", Publication { crashes: 0, faults: 0, ..design }.with_backup(), NEVER_LOST);
}

#[test]
fn a_relay_that_goes_on_behind_the_marker_publishes_twice_when_the_database_goes_back() {
    let design = publication(b"aa", |design| design.refuses_ahead = false);
    refute("goes on behind the marker", Publication { crashes: 0, faults: 0, ..design }.with_backup(), NEVER_TWICE);
}

#[test]
fn an_epoch_that_comes_again_when_the_database_goes_back_publishes_twice() {
    let design = publication(b"a", |design| design.has_fresh_epochs = false);
    refute("counted epochs", only_stamped(Publication { crashes: 0, faults: 1, ..design }).with_backup(), NEVER_TWICE);
}

#[test]
fn a_stamp_taken_back_after_its_mark_was_lost_publishes_twice() {
    let design = publication(b"a", |design| design.leaves_what_is_published = false);
    refute("unstamps what was marked", Publication { faults: 0, ..design }.with_backup(), NEVER_TWICE);
}

#[test]
fn a_row_parked_by_its_stamp_alone_publishes_twice_when_the_database_goes_back() {
    let design = publication(b"a", |design| design.parks_as_owner = false);
    refute("parks by stamp alone", only_stamped(Publication { faults: 1, ..design }).with_backup(), NEVER_TWICE);
}

#[test]
fn an_audit_that_believes_a_marker_younger_than_the_records_it_read_publishes_twice() {
    let design = publication(b"aa", |design| design.audits_from_the_marker = false);
    refute("a late marker", only_stamped(Publication { faults: 0, ..design }).with_backup(), NEVER_TWICE);
}

#[test]
fn a_single_put_is_promised_as_it_was_verified_or_leaves_nothing() {
    check("single PUT", Completion::house(Layout::Single, 2, 2, 2));
}

#[test]
fn an_object_that_is_read_back_is_promised_as_it_was_verified_or_leaves_nothing() {
    check("read back", Completion::house(Layout::ReadBack, 2, 1, 2));
}

#[test]
fn a_multipart_upload_is_promised_as_it_was_verified_or_leaves_nothing() {
    check("multipart", Completion::house(Layout::Multipart, 2, 1, 1));
}

#[test]
fn neither_fence_nor_read_back_publishes_twice() {
    let neither = |design: &mut publication::Design| {
        design.fences = false;
        design.settling = Settling::Unread;
    };
    refute("neither fence nor read-back", publication(b"aa", neither), NEVER_TWICE);
}

#[test]
fn a_fence_without_read_back_publishes_twice() {
    let design = publication(b"aa", |design| design.settling = Settling::Unread);
    refute("fence without read-back", design, NEVER_TWICE);
}

#[test]
fn read_back_without_a_fence_publishes_twice() {
    refute("read-back without fence", publication(b"aa", |design| design.fences = false), NEVER_TWICE);
}

#[test]
fn two_relays_that_skip_each_others_rows_change_the_order() {
    let skip_locked = |design: &mut publication::Design| {
        design.has_owner = false;
        design.claims_when_settled = false;
        design.fences = false;
    };
    refute("skip locked", Publication { crashes: 0, faults: 0, ..publication(b"aa", skip_locked) }, IN_ORDER);
}

#[test]
fn a_cursor_loses_a_promise_that_is_committed_late() {
    refute("cursor", publication(b"ab", |design| design.has_cursor = true), NEVER_LOST);
}

#[test]
fn a_batch_before_the_last_is_settled_publishes_twice() {
    let unsettled = |design: &mut publication::Design| {
        design.settles_first = false;
        design.claims_when_settled = false;
    };
    refute("unsettled", publication(b"aa", unsettled), NEVER_TWICE);
}

#[test]
fn a_marker_of_a_number_alone_loses_an_aborted_batch() {
    let by_number = |design: &mut publication::Design| {
        design.settles_first = false;
        design.claims_when_settled = false;
        design.settling = Settling::ByNumber;
    };
    refute("marker by number", publication(b"aa", by_number), TRULY_MARKED);
}

#[test]
fn a_stamp_taken_back_by_a_former_owner_publishes_twice() {
    let design = publication(b"aa", |design| design.unstamps_as_owner = false);
    refute("unguarded unstamp", only_stamped(design), NEVER_TWICE);
}

#[test]
fn a_row_parked_by_a_former_owner_is_published_twice() {
    let unguarded = |design: &mut publication::Design| {
        design.parks_by_stamp = false;
        design.parks_as_owner = false;
    };
    refute("unguarded park", only_stamped(publication(b"aa", unguarded)), NEVER_TWICE);
}

#[test]
fn a_parked_row_that_does_not_hold_its_key_up_changes_the_order() {
    refute("parks one row", publication(b"aa", |design| design.parks_the_key = false), IN_ORDER);
}

#[test]
fn numbers_drawn_without_the_lock_of_their_key_change_the_order() {
    refute("no key lock", publication(b"aa", |design| design.locks_the_key = false), IN_ORDER);
}

#[test]
fn a_plain_url_overwrites_what_was_verified() {
    refute("plain URL", completion(Layout::Single, |design| design.puts_once = false), SAME_BYTES);
}

#[test]
fn a_move_under_no_version_ends_a_session_twice() {
    refute("unguarded moves", completion(Layout::Single, |design| design.guards_moves = false), ONE_END);
}

#[test]
fn believing_the_answer_to_a_join_rejects_a_good_upload() {
    refute("believes the answer", completion(Layout::Multipart, |design| design.looks_again = false), JUSTLY_REJECTED);
}

#[test]
fn destroying_before_deciding_deletes_what_was_verified() {
    refute("destroys first", completion(Layout::Single, |design| design.decides_first = false), SAME_BYTES);
}

#[test]
fn one_sweep_leaves_the_object_of_a_late_put() {
    refute("one sweep", completion(Layout::Single, |design| design.sweeps_twice = false), NOTHING_LEFT);
}

#[test]
fn one_sweep_leaves_what_lands_late_of_a_multipart_upload() {
    refute("one sweep of parts", completion(Layout::Multipart, |design| design.sweeps_twice = false), NOTHING_LEFT);
}

#[test]
fn aborting_only_the_upload_that_the_row_names_leaves_another() {
    refute("sweeps one upload", completion(Layout::Multipart, |design| design.sweeps_all = false), NOTHING_LEFT);
}
