//! Every place between two side effects, struck in a real process: killed, failed and held up. Whatever happened there,
//! a client that asks again gets its upload through once, and nothing is left behind.

use std::time::Duration;

use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::audit::is_clean;
use crate::harness::faults::upload_of;
use crate::harness::serving::Serving;
use crate::harness::uploads::{PART, part_hashes};
use crate::harness::{Answer, House, bytes, sha256};

/// Killed; failed as if the answer to what was just done were lost; held up for longer than any lease.
const ACTIONS: [&str; 3] = ["kill", "error", "4000"];

/// Longer than a dead owner's leases.
const LEASE_OVER: Duration = Duration::from_secs(31);

/// A client that goes on asking, as real ones do, and the broker that is struck.
struct Struck {
    house: House,
    /// None once it died: then the house is the broker that comes next.
    victim: Option<Serving>,
    action: &'static str,
    point: &'static str,
}

impl Struck {
    /// `before` is what the failpoint, or another one, does first.
    async fn new(point: &'static str, action: &'static str, before: &str, more: &[(&str, &str)]) -> Self {
        let mut house = House::with(|settings| settings.broker.complete_wait = Duration::from_secs(5)).await;
        house.stop().await;
        let failpoints = format!("{before}1*return({action})");
        let failpoints = if failpoints.contains('=') { failpoints } else { format!("{point}={failpoints}") };
        let environment: Vec<(&str, &str)> = [("FAILPOINTS", failpoints.as_str())].iter().chain(more).copied().collect();
        let victim = Some(house.serving(&environment).await);
        Self { house, victim, action, point }
    }

    /// Asks until there is an answer that says something; a broker that died is replaced.
    async fn ask(&mut self, method: &str, path: &str, body: &Value) -> Answer {
        for _ in 0..60 {
            let url = self.victim.as_ref().map_or_else(|| self.house.url(), |victim| victim.url().to_owned());
            let request = self.house.http.request(method.parse().unwrap(), format!("{url}{path}"));
            let request = request.header("idempotency-key", "one").json(body);
            match request.send().await {
                Ok(response) if response.status().as_u16() < 500 => {
                    let (status, headers) = (response.status().as_u16(), response.headers().clone());
                    // The process may die between the head of its answer and the body.
                    if let Ok(text) = response.text().await {
                        return Answer { status, headers, json: serde_json::from_str(&text).unwrap_or(Value::Null), text };
                    }
                }
                Ok(_) => {}
                Err(_) => self.replace_if_dead().await,
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        panic!("{} of {}: {method} {path} was never answered\n{}", self.action, self.point, self.log());
    }

    async fn replace_if_dead(&mut self) {
        let Some(victim) = &mut self.victim else { return };
        if victim.has_ended().await {
            self.was_reached().await;
            self.victim = None;
            // The next broker comes when the dead one's leases are over; in real time that is some seconds later.
            self.house.start(|_| {}).await;
            self.house.push_clock(LEASE_OVER);
        }
    }

    fn log(&self) -> String {
        self.victim.as_ref().map_or_else(String::new, Serving::log)
    }

    /// What strikes no one proves nothing.
    async fn was_reached(&self) {
        if let Some(victim) = &self.victim {
            victim.says(&format!("reached failpoint {}: {}", self.point, self.action)).await;
        }
    }

    async fn open(&mut self, content: &[u8], more: &Value) -> Answer {
        let mut body = json!({"topic": self.house.topic, "size": content.len(), "sha256": sha256(content), "key": "k"});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let opened = self.ask("POST", "/lfs/uploads", &body).await;
        assert!([200, 201].contains(&opened.status), "{}", opened.text);
        opened
    }

    /// Completes until the pointer is in Kafka.
    async fn complete(&mut self, id: &str) -> Answer {
        for _ in 0..60 {
            let answer = self.ask("POST", &format!("/lfs/uploads/{id}/complete"), &json!({})).await;
            match answer.status {
                200 => return answer,
                202 => self.replace_if_dead().await,
                _ => panic!("{} of {}: {}\n{}", self.action, self.point, answer.text, self.log()),
            }
        }
        panic!("{} of {}: {id} was never published\n{}", self.action, self.point, self.log());
    }

    /// Ends the victim, if it still lives, and has another broker look at what it left.
    async fn hand_over(&mut self) {
        if let Some(victim) = self.victim.take() {
            assert_ne!(self.action, "kill", "it is alive:\n{}", victim.log());
            drop(victim);
            self.house.start(|_| {}).await;
            self.house.push_clock(LEASE_OVER);
        }
    }

    /// One upload, one pointer, the same answer for ever, the right bytes, and nothing else anywhere.
    async fn one_pointer(&mut self, opened: &Answer, done: &Answer, content: &[u8]) {
        let what = format!("{} of {}", self.action, self.point);
        self.was_reached().await;
        self.hand_over().await;
        let house = &self.house;
        assert_eq!(house.complete(&opened.id()).await.expect(200).json, done.json, "{what}");
        let records = house.distinct_records().await;
        assert_eq!(records.iter().map(upload_of).collect::<Vec<_>>(), [opened.id()], "{what}");
        let resolved = house.resolve(&records[0].value, "").await.expect(200);
        assert!(house.download(&resolved.json).await == content, "{what}");
        let sessions: (i64,) = sqlx::query_as("select count(*) from upload_sessions").fetch_one(&house.db).await.unwrap();
        assert_eq!((sessions.0, house.quota().await), (1, (0, 0)), "{what}");
        assert_eq!(house.objects().await, [opened.json["object_key"].as_str().unwrap()], "{what}");
        if house.is_exactly_once() {
            is_clean(house).await;
        }
    }
}

/// Uploads in parts, through a broker that is struck on the way.
async fn upload_struck(point: &'static str, before: &str, more: &Value) {
    join_all(ACTIONS.map(|action| async move {
        let content = bytes(PART + 9, 1);
        let mut struck = Struck::new(point, action, before, &[]).await;
        let opened = struck.open(&content, more).await;
        struck.house.put_parts(&opened.json["parts"], &content).await;
        let done = struck.complete(&opened.id()).await;
        // What was struck after the promise may show only after the answer.
        struck.replace_if_dead().await;
        struck.one_pointer(&opened, &done, &content).await;
    }))
    .await;
}

/// With the hash of every part, so that the bytes need not be read.
async fn hashed_upload_struck(point: &'static str, before: &str) {
    let hashes = part_hashes(&bytes(PART + 9, 1), PART);
    upload_struck(point, before, &json!({"part_size": PART, "part_sha256": hashes})).await;
}

/// Where Kafka has no transactions these are never reached.
async fn transaction_struck(point: &'static str) {
    if std::env::var_os("LFS_TEST_KAFKA").is_some() {
        hashed_upload_struck(point, "").await;
    }
}

#[tokio::test]
async fn struck_after_the_session_was_stored() {
    hashed_upload_struck("open.stored", "").await;
}

#[tokio::test]
async fn struck_after_s3_began_a_multipart_upload() {
    hashed_upload_struck("s3.begun", "").await;
}

#[tokio::test]
async fn struck_before_an_open_was_answered() {
    hashed_upload_struck("open.answered", "").await;
}

#[tokio::test]
async fn struck_after_a_completion_was_claimed() {
    hashed_upload_struck("saved.completing", "").await;
}

#[tokio::test]
async fn struck_after_s3_joined_the_parts() {
    hashed_upload_struck("s3.joined", "").await;
}

#[tokio::test]
async fn struck_after_the_object_was_proved() {
    hashed_upload_struck("complete.proved", "").await;
}

#[tokio::test]
async fn struck_after_the_bytes_were_read() {
    upload_struck("complete.proved", "1*off->", &json!({"part_size": PART})).await;
}

#[tokio::test]
async fn struck_after_the_pointer_was_promised() {
    hashed_upload_struck("saved.verified", "").await;
}

#[tokio::test]
async fn struck_after_the_last_owner_was_fenced() {
    hashed_upload_struck("relay.fenced", "").await;
}

#[tokio::test]
async fn struck_after_a_batch_was_stamped() {
    hashed_upload_struck("relay.stamped", "").await;
}

#[tokio::test]
async fn struck_after_a_dead_owners_batch_was_settled() {
    hashed_upload_struck("relay.settled", "relay.stamped=1*return(error);relay.settled=").await;
}

#[tokio::test]
async fn struck_after_the_pointers_were_sent() {
    hashed_upload_struck("relay.sent", "").await;
}

#[tokio::test]
async fn struck_after_the_marker_was_sent() {
    transaction_struck("relay.listed").await;
}

#[tokio::test]
async fn struck_after_kafka_committed() {
    transaction_struck("relay.committed").await;
}

#[tokio::test]
async fn struck_after_the_pointer_was_marked() {
    hashed_upload_struck("relay.marked", "").await;
}

#[tokio::test]
async fn struck_after_an_upload_without_its_bytes_was_opened_again() {
    join_all(ACTIONS.map(|action| async move {
        let mut struck = Struck::new("saved.open", action, "", &[]).await;
        let opened = struck.open(b"hello", &json!({})).await;
        let path = format!("/lfs/uploads/{}/complete", opened.id());
        struck.ask("POST", &path, &json!({})).await.expect_problem(409, "object-missing");
        struck.house.put(&opened.json["upload"], b"hello").await.expect(200);
        let done = struck.complete(&opened.id()).await;
        struck.one_pointer(&opened, &done, b"hello").await;
    }))
    .await;
}

/// How an upload comes to its end without a pointer.
#[derive(Clone, Copy)]
enum End {
    Aborted,
    Rejected,
    Expired,
}

/// Ends an upload, of which a part is in S3, through a broker that is struck on the way.
async fn end_struck(point: &'static str, end: End) {
    join_all(ACTIONS.map(|action| async move {
        let expires = if matches!(end, End::Expired) { "2" } else { "3600" };
        let mut struck = Struck::new(point, action, "", &[("LFS_BROKER_SESSION_SECONDS", expires)]).await;
        let content = bytes(PART + 9, 1);
        let opened = struck.open(&content, &json!({"part_size": PART})).await;
        let (path, object_key) = (format!("/lfs/uploads/{}", opened.id()), opened.json["object_key"].as_str().unwrap());
        struck.house.put(&opened.json["parts"][0], &content[..PART]).await.expect(200);
        let state = match end {
            End::Aborted => {
                struck.ask("DELETE", &path, &json!({})).await.expect(204);
                "aborted"
            }
            End::Rejected => {
                struck.house.put_object(object_key, b"of somebody else", None).await;
                let abort = struck.house.s3.abort_multipart_upload().bucket(&struck.house.bucket).key(object_key);
                let listed = struck.house.s3.list_multipart_uploads().bucket(&struck.house.bucket).send().await.unwrap();
                abort.upload_id(listed.uploads()[0].upload_id().unwrap()).send().await.unwrap();
                let refused = struck.ask("POST", &format!("{path}/complete"), &json!({})).await;
                refused.expect_problem(422, "object-foreign");
                "rejected"
            }
            End::Expired => {
                for _ in 0..60 {
                    if struck.ask("GET", &path, &json!({})).await.state() == "expired" {
                        break;
                    }
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                "expired"
            }
        };
        if action == "kill" {
            // The sweeper is struck when it comes to it.
            for _ in 0..100 {
                struck.replace_if_dead().await;
            }
        }
        struck.was_reached().await;
        struck.hand_over().await;
        struck.house.until(&opened.id(), state).await;
        struck.house.until_nothing_is_left(object_key).await;
        assert_eq!(struck.house.quota().await, (0, 0));
        assert_eq!(struck.house.records(&struck.house.topic).await.len(), 0);
        // After the second pass nobody looks any more.
        struck.house.push_clock(Duration::from_secs(7300));
        let due = "select count(*) from upload_sessions where cleanup_due_at is not null";
        let house = &struck.house;
        house
            .eventually("the second pass is over", || async {
                let due: (i64,) = sqlx::query_as(due).fetch_one(&house.db).await.unwrap();
                due.0 == 0
            })
            .await;
        is_clean(house).await;
    }))
    .await;
}

#[tokio::test]
async fn struck_after_an_upload_was_aborted() {
    end_struck("saved.aborted", End::Aborted).await;
}

#[tokio::test]
async fn struck_after_an_upload_was_rejected() {
    end_struck("saved.rejected", End::Rejected).await;
}

#[tokio::test]
async fn struck_after_an_upload_expired() {
    end_struck("saved.expired", End::Expired).await;
}

#[tokio::test]
async fn struck_after_s3_was_swept() {
    end_struck("sweep.removed", End::Aborted).await;
}

#[tokio::test]
async fn a_relay_that_slept_in_the_middle_of_a_batch_wakes_up_fenced() {
    let mut house = House::new().await;
    if !house.is_exactly_once() {
        // Only transactions have a fence.
        return;
    }
    house.stop().await;
    // Whoever asked waits longer than it sleeps.
    let zombie = house.serving(&[("FAILPOINTS", "relay.sent=1*return(1000)"), ("LFS_BROKER_COMPLETE_WAIT_SECONDS", "45")]).await;
    let opened = house.http.post(format!("{}/lfs/uploads", zombie.url()));
    let body = json!({"topic": house.topic, "size": 5, "sha256": sha256(b"hello"), "key": "k"});
    let opened = house.send(opened.json(&body)).await.expect(201);
    house.put(&opened.json["upload"], b"hello").await.expect(200);
    let complete = house.http.post(format!("{}/lfs/uploads/{}/complete", zombie.url(), opened.id()));
    let asked = tokio::spawn(complete.send());
    zombie.says("reached failpoint relay.sent: 1000").await;
    zombie.signal("STOP");
    // It holds its leases, and a transaction with a record in it, until they run out.
    house.start(|_| {}).await;
    house.until(&opened.id(), "published").await;
    zombie.signal("CONT");
    zombie.says("was taken").await;
    assert!(asked.await.unwrap().is_ok_and(|answer| answer.status() == 200), "it answers with what the other one did");
    assert_eq!(house.records(&house.topic).await.len(), 1);
    is_clean(&house).await;
}

#[tokio::test]
async fn a_shard_that_hangs_holds_up_no_other_shard() {
    let mut house = House::new().await;
    house.log_the_outbox().await;
    house.stop().await;
    let serving = house.serving(&[("FAILPOINTS", "relay.stamped=1*return(20000)")]).await;
    let mut opened = Vec::new();
    for number in 0..12 {
        let body = json!({"topic": house.topic, "size": 5, "sha256": sha256(b"hello"), "key": format!("k{number}")});
        let answer = house.send(house.http.post(format!("{}/lfs/uploads", serving.url())).json(&body)).await.expect(201);
        house.put(&answer.json["upload"], b"hello").await.expect(200);
        opened.push(answer.id());
    }
    let complete = |id: &str| house.send(house.http.post(format!("{}/lfs/uploads/{id}/complete", serving.url())));
    let first = complete(&opened[0]);
    let epochs = || async {
        let epochs: Vec<(i64,)> =
            sqlx::query_as("select epoch from relay_shards order by shard").fetch_all(&house.db).await.unwrap();
        epochs
    };
    let (taken, first) = tokio::join!(
        async {
            serving.says("reached failpoint relay.stamped").await;
            let taken = epochs().await;
            let begun = std::time::Instant::now();
            join_all(opened[1..].iter().map(|id| complete(id))).await;
            let shard: (i32,) =
                sqlx::query_as("select shard from outbox where batch is not null").fetch_one(&house.db).await.unwrap();
            let others = "select count(*), count(*) filter (where state = 'published') from outbox_log
                 join upload_sessions on id = session_id where outbox_log.shard <> $1";
            house
                .eventually("all of the other shards is published", || async {
                    let (all, published): (i64, i64) = sqlx::query_as(others).bind(shard.0).fetch_one(&house.db).await.unwrap();
                    assert!(all > 0);
                    all == published
                })
                .await;
            let took = begun.elapsed();
            assert!(took < Duration::from_secs(10), "the other shards waited {took:?}");
            taken
        },
        first
    );
    first.expect(202);
    // Nor were the leases lost meanwhile, and taken again under the next epoch.
    assert_eq!(epochs().await, taken);
    for id in &opened {
        while complete(id).await.status == 202 {}
    }
    assert_eq!(house.distinct_records().await.len(), 12);
}
