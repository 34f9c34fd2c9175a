//! What ends without a pointer leaves nothing: no object, no multipart upload, no quota, no idempotency key.

use std::time::Duration;

use lfs_broker::objects::Objects;
use serde_json::{Value, json};
use time::OffsetDateTime;

use crate::faults::{faulty, house_on};
use crate::harness::proxy::Call;
use crate::harness::uploads::PART;
use crate::harness::{House, bytes};

/// The end of a session by the default policy, and a little more.
const EXPIRED: Duration = Duration::from_secs(3601);

#[derive(Debug, Clone, Copy)]
enum End {
    Expired,
    Aborted,
    Rejected,
}

const ENDS: [End; 3] = [End::Expired, End::Aborted, End::Rejected];

impl House {
    /// When S3 is swept again for this upload.
    async fn cleanup_due(&self, id: &str) -> Option<OffsetDateTime> {
        let due: (Option<OffsetDateTime>,) = sqlx::query_as("select cleanup_due_at from upload_sessions where id = $1::uuid")
            .bind(id)
            .fetch_one(&self.db)
            .await
            .unwrap();
        due.0
    }

    /// Ends an upload without a pointer; what was put of it is there before.
    async fn end(&self, opened: &Value, how: End) {
        let id = opened["id"].as_str().unwrap();
        match how {
            End::Expired => self.push_clock(EXPIRED),
            End::Aborted => drop(self.delete(&format!("/lfs/uploads/{id}")).await.expect(204)),
            End::Rejected => {
                self.put_object(opened["object_key"].as_str().unwrap(), b"of somebody else", None).await;
                self.complete(id).await.expect_problem(422, "object-foreign");
            }
        }
        // Ended in the database first, swept in S3 after; then it waits for the second pass.
        self.eventually("the first pass is over", || async {
            let due = self.cleanup_due(id).await;
            due.is_some_and(|due| due > OffsetDateTime::now_utc() + Duration::from_secs(300))
        })
        .await;
        assert_eq!(self.upload(id).await.state(), format!("{how:?}").to_lowercase());
    }
}

#[tokio::test]
async fn an_upload_that_ends_without_a_pointer_leaves_nothing() {
    for how in ENDS {
        let house = House::new().await;
        let content = bytes(PART + 9, 1);
        let single = match how {
            End::Rejected => house.open(b"hello", json!({})).await.expect(201),
            End::Expired | End::Aborted => house.put_up(b"hello", json!({})).await,
        };
        let parts = house.open_hashed_parts(&content, json!({})).await.expect(201);
        house.put(&parts.json["parts"][0], &content[..PART]).await.expect(200);
        assert_eq!(house.quota().await, (2, 5 + content.len() as i64));
        house.end(&single.json, how).await;
        // One without all its parts is not rejected: it is open until it ends otherwise.
        house.end(&parts.json, if matches!(how, End::Rejected) { End::Aborted } else { how }).await;
        house.until_nothing_is_left(parts.json["object_key"].as_str().unwrap()).await;
        assert_eq!(house.quota().await, (0, 0), "{how:?}");
        assert_eq!(house.records(&house.topic).await.len(), 0);
    }
}

#[tokio::test]
async fn what_lands_after_the_end_is_removed_by_the_second_pass() {
    let house = House::new().await;
    let content = bytes(PART + 9, 2);
    let mut opened = Vec::new();
    for _ in ENDS {
        opened.push(house.open(b"hello", json!({})).await.expect(201));
    }
    let parts = house.open_hashed_parts(&content, json!({})).await.expect(201);
    // Expired last: it pushes the clock, beyond the passes that follow the ends of the others' URLs.
    for (opened, how) in opened.iter().zip([End::Aborted, End::Rejected, End::Expired]) {
        house.end(&opened.json, how).await;
    }
    let key = parts.json["object_key"].as_str().unwrap();
    house.until_nothing_is_left(key).await;
    for ended in &opened[..2] {
        let id = ended.id();
        house
            .eventually("only the last pass is due", || async {
                house.cleanup_due(&id).await.is_some_and(|due| due > OffsetDateTime::now_utc() + Duration::from_secs(4000))
            })
            .await;
    }
    // The URLs are still valid for the real S3, whose clock nobody pushed: as PUTs that were under way.
    for opened in &opened {
        house.put(&opened.json["upload"], b"hello").await.expect(200);
    }
    // And a begin of a multipart upload whose answer was lost.
    house.s3.create_multipart_upload().bucket(&house.bucket).key(key).send().await.unwrap();
    assert_eq!(house.objects().await.len(), 3);
    // 900 s of URL, a minute and the longest PUT after the first two, of which 3,601 s are over.
    house.push_clock(Duration::from_secs(900));
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(house.objects().await.len(), 3, "the longest PUT may still be under way");
    house.push_clock(Duration::from_secs(100));
    house.eventually("what was aborted and rejected is swept", || async { house.objects().await.len() == 1 }).await;
    house.push_clock(Duration::from_secs(2500));
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(house.objects().await.len(), 1, "the longest PUT may still be under way");
    house.push_clock(Duration::from_secs(110));
    house.until_nothing_is_left(key).await;
    for opened in opened.iter().chain([&parts]) {
        let id = opened.id();
        house.eventually("no pass is due any more", || async { house.cleanup_due(&id).await.is_none() }).await;
    }
}

#[tokio::test]
async fn a_published_upload_holds_no_quota_and_is_never_swept() {
    let house = House::new().await;
    let done = house.publish(b"hello", json!({})).await;
    assert_eq!(house.quota().await, (0, 0));
    house.push_clock(Duration::from_secs(30 * 86_400));
    // Another upload's end shows that the sweeper was there.
    let other = house.open(b"other", json!({})).await.expect(201);
    house.end(&other.json, End::Aborted).await;
    assert_eq!(house.objects().await.len(), 1);
    assert_eq!(house.upload(&done.id()).await.state(), "published");
}

#[tokio::test]
async fn an_upload_that_is_being_completed_does_not_expire() {
    let house = House::new().await;
    let opened = house.put_up(b"hello", json!({})).await;
    house.taken_by_the_dead(&opened.id()).await;
    let longer = "update upload_sessions set lease_until = clock_timestamp() + interval '2 hours'";
    sqlx::raw_sql(longer).execute(&house.db).await.unwrap();
    house.push_clock(EXPIRED);
    let other = house.open(b"other", json!({})).await.expect(201);
    house.end(&other.json, End::Aborted).await;
    assert_eq!(house.upload(&opened.id()).await.state(), "completing");
    house.push_clock(EXPIRED);
    house.until(&opened.id(), "published").await;
    assert_eq!(house.quota().await, (0, 0));
}

#[tokio::test]
async fn an_idempotency_key_is_forgotten_a_day_after_the_end() {
    let house = House::new().await;
    let body = json!({"topic": house.topic, "size": 5, "sha256": crate::harness::sha256(b"hello")});
    let open = || house.send(house.request("POST", "/lfs/uploads").header("idempotency-key", "day").json(&body));
    let keys = || async {
        let kept: (i64,) = sqlx::query_as("select count(*) from idempotency_keys").fetch_one(&house.db).await.unwrap();
        kept.0
    };
    let first = open().await.expect(201);
    house.put(&first.json["upload"], b"hello").await.expect(200);
    house.complete(&first.id()).await.expect(200);
    house.push_clock(Duration::from_secs(86_300));
    assert_eq!(open().await.expect(200).id(), first.id());
    house.push_clock(Duration::from_secs(200));
    house.eventually("the key is forgotten", || async { keys().await == 0 }).await;
    assert_ne!(open().await.expect(201).id(), first.id());
    // The second one is open: its key stays until that has ended, and a day more.
    house.push_clock(EXPIRED);
    house.eventually("it has expired", || async { house.quota().await == (0, 0) }).await;
    assert_eq!(keys().await, 1);
    house.push_clock(Duration::from_secs(86_500));
    house.eventually("that key is forgotten too", || async { keys().await == 0 }).await;
}

#[tokio::test]
async fn what_a_trial_of_the_store_left_is_removed_though_its_broker_died() {
    let house = House::new().await;
    let left = format!(".lfs-broker-probe/{}", uuid::Uuid::new_v4());
    house.put_object(&format!("{left}/honest"), b"hello", None).await;
    house.put_object(&format!("{left}/copy"), b"hello", None).await;
    let part = format!("{left}/copy-part");
    house.s3.create_multipart_upload().bucket(&house.bucket).key(&part).send().await.unwrap();
    assert!(house.has_open_multipart(&part).await);
    let objects = Objects::connect(&house.settings.objects).await.unwrap();
    objects.clean_after_trials(&house.bucket, Duration::from_millis(100)).await.unwrap();
    house.until_nothing_is_left(&part).await;
}

#[tokio::test]
async fn an_upload_whose_end_slides_while_the_sweeper_looks_does_not_expire() {
    let house = House::new().await;
    let opened = house.open_parts(&bytes(PART + 9, 7), json!({})).await.expect(201);
    // As a call for parts does it that took the time just before the end; its COMMIT is still to come.
    let mut sliding = house.db.begin().await.unwrap();
    let slide = "update upload_sessions set expires_at = expires_latest_at";
    sqlx::raw_sql(slide).execute(&mut *sliding).await.unwrap();
    house.push_clock(EXPIRED);
    let waits = "select count(*) from pg_stat_activity
                 where datname = current_database() and wait_event_type = 'Lock' and query like '%update upload_sessions%'";
    let waiting = async || sqlx::query_scalar::<_, i64>(waits).fetch_one(&house.db).await.unwrap();
    house.eventually("the sweeper has read the end before, and waits for the row", || async { waiting().await == 1 }).await;
    sliding.commit().await.unwrap();
    house.eventually("the sweeper has gone on", || async { waiting().await == 0 }).await;
    // Another upload's end shows that it was there.
    let other = house.open(b"other", json!({})).await.expect(201);
    house.end(&other.json, End::Aborted).await;
    assert_eq!(house.upload(&opened.id()).await.expect(200).state(), "open");
}

#[tokio::test]
async fn a_slow_s3_is_asked_for_many_failed_uploads_at_a_time_and_by_one_replica_for_each() {
    const MANY: usize = 16;
    let s3 = faulty().await;
    let mut house = house_on(&s3).await;
    let mut ids = Vec::new();
    for _ in 0..MANY {
        ids.push(house.open(b"hello", json!({})).await.expect(201).id());
    }
    house.restart(|settings| settings.sweeper.every = Duration::from_secs(4)).await;
    let _other = house.replica().await;
    s3.slow_down(Duration::from_millis(200));
    let ended = "update upload_sessions set state = 'aborted', cleanup_due_at = clock_timestamp()";
    sqlx::raw_sql(ended).execute(&house.db).await.unwrap();
    let passed = "select count(*) from upload_sessions where cleanup_due_at > clock_timestamp() + interval '5 minutes'";
    house
        .eventually("the first pass is over", || async {
            sqlx::query_scalar::<_, i64>(passed).fetch_one(&house.db).await.unwrap() == MANY as i64
        })
        .await;
    // Two replicas, one after another each, would make two.
    assert!(s3.most_at_once() > 4, "{} calls at once", s3.most_at_once());
    for id in ids {
        assert_eq!(s3.count_of(Call::ListUploads, &id), 1, "S3 was asked about {id} by both replicas");
    }
}

#[tokio::test]
async fn a_slow_s3_holds_up_no_quota() {
    let s3 = faulty().await;
    let house = house_on(&s3).await;
    let aborted = house.open(b"hello", json!({})).await.expect(201).id();
    let overdue = house.open(b"hello", json!({})).await.expect(201).id();
    s3.slow_down(Duration::from_secs(3));
    house.delete(&format!("/lfs/uploads/{aborted}")).await.expect(204);
    house.eventually("S3 is asked", || async { s3.count_of(Call::ListUploads, &aborted) > 0 }).await;
    house.push_clock(EXPIRED);
    house.eventually("the quota is free", || async { house.quota().await == (0, 0) }).await;
    let soon = OffsetDateTime::now_utc() + EXPIRED;
    assert!(house.cleanup_due(&aborted).await.unwrap() < soon, "only after S3 had answered about another upload");
    assert_eq!(house.upload(&overdue).await.state(), "expired");
}
