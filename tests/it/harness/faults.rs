//! What a test does to a house behind its back, and what it reads there.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use lfs_broker::app;
use serde_json::Value;
use uuid::Uuid;

use super::proxy::Wire;
use super::servers::servers;
use super::{Answer, House, Record};

/// An answer without a dependency is due within two seconds; the machine of a test may be busy.
const AT_ONCE: Duration = Duration::from_millis(2500);

/// A proxy in front of the S3 server.
pub(crate) async fn wire_to_s3() -> Wire {
    Wire::to(servers().s3.endpoint.trim_start_matches("http://")).await
}

/// A house whose clients reach S3 through a wire; its broker does not need it.
pub(crate) async fn clients_behind_s3(change: impl FnOnce(&mut app::Settings)) -> (House, Wire) {
    let wire = wire_to_s3().await;
    let endpoint = format!("http://{}", wire.address());
    let house = House::with(|settings| {
        settings.objects.public_endpoint = Some(endpoint);
        change(settings);
    })
    .await;
    (house, wire)
}

/// A proxy in front of PostgreSQL.
pub(crate) async fn wire_to_database() -> Wire {
    let [_, _, _, database] = servers().secrets();
    Wire::to(&database).await
}

/// The upload that a record tells of.
pub(crate) fn upload_of(record: &Record) -> String {
    record.header("lfs-upload-id").expect("a record of ours").to_owned()
}

/// Sends what should be refused, and asserts that it is, soon, and with a time to come again.
pub(crate) async fn refused_soon(answer: impl Future<Output = Answer>, codes: &[&str]) -> Answer {
    let begun = Instant::now();
    let answer = answer.await;
    let took = begun.elapsed();
    assert!(codes.contains(&answer.code()), "{}: {}", answer.status, answer.text);
    let code = answer.code().to_owned();
    let answer = answer.expect_problem(503, &code);
    assert!(answer.headers.contains_key("retry-after") && answer.json["retryable"] == true, "{}", answer.text);
    assert!(took < AT_ONCE, "answered after {took:?}: {}", answer.text);
    answer
}

impl House {
    /// Whether a pointer is in Kafka once, for readers of what is committed.
    pub(crate) fn is_exactly_once(&self) -> bool {
        self.settings.kafka.delivery == lfs_broker::kafka::Delivery::ExactlyOnce
    }

    /// The records of the house's topic, each upload's once: a broker that died may have sent one again, in the same
    /// bytes, where there are no transactions.
    pub(crate) async fn distinct_records(&self) -> Vec<Record> {
        let mut first: BTreeMap<String, Record> = BTreeMap::new();
        let mut distinct = Vec::new();
        for record in self.records(&self.topic).await {
            let id = upload_of(&record);
            match first.get(&id) {
                None => {
                    first.insert(id, record.clone());
                    distinct.push(record);
                }
                Some(sent) => {
                    assert!(!self.is_exactly_once(), "{id} is in Kafka twice");
                    assert_eq!((&sent.key, &sent.value, &sent.headers), (&record.key, &record.value, &record.headers));
                }
            }
        }
        distinct
    }

    /// Says that a broker which is dead took the session to complete it; its lease ends in 30 seconds.
    pub(crate) async fn taken_by_the_dead(&self, id: &str) {
        let taken = sqlx::query(
            "update upload_sessions set state = 'completing', lease_owner = gen_random_uuid(), lease_attempt = 1,
                 lease_until = clock_timestamp() + interval '30 seconds', version = version + 1 where id = $1",
        );
        let taken = taken.bind(id.parse::<Uuid>().unwrap()).execute(&self.db).await.unwrap();
        assert_eq!(taken.rows_affected(), 1);
    }

    /// Writes down every row of the outbox, for it does not keep what was published.
    pub(crate) async fn log_the_outbox(&self) {
        let log = "create table outbox_log (like outbox);
             create function log_outbox() returns trigger language plpgsql as
                 $$ begin insert into outbox_log select new.*; return null; end $$;
             create trigger log_outbox after insert on outbox for each row execute function log_outbox();";
        sqlx::raw_sql(log).execute(&self.db).await.unwrap();
    }

    /// The numbers under which pointers were promised, by upload.
    pub(crate) async fn promises(&self) -> BTreeMap<String, i64> {
        let rows: Vec<(Uuid, i64)> =
            sqlx::query_as("select session_id, number from outbox_log").fetch_all(&self.db).await.unwrap();
        rows.into_iter().map(|(id, number)| (id.to_string(), number)).collect()
    }

    /// Asserts that each key's records are in the order in which they were promised.
    pub(crate) fn assert_in_order(records: &[Record], promises: &BTreeMap<String, i64>) {
        let mut last: BTreeMap<Vec<u8>, (i32, i64)> = BTreeMap::new();
        for record in records {
            let number = promises[&upload_of(record)];
            let key = record.key.clone().expect("a record with a key");
            if let Some((partition, before)) = last.insert(key.clone(), (record.partition, number)) {
                assert_eq!(partition, record.partition, "{key:?} is in two partitions");
                assert!(before < number, "{key:?}: promise {number} comes after {before}");
            }
        }
    }

    /// What the tenant holds: open sessions and their bytes.
    pub(crate) async fn quota(&self) -> (i64, i64) {
        let held = sqlx::query_as("select open_sessions, reserved_bytes from tenants where tenant = 'default'");
        held.fetch_one(&self.db).await.unwrap()
    }

    /// Completes as a client does that asks again for as long as it is told to.
    pub(crate) async fn insist(&self, id: &str) -> Answer {
        for _ in 0..60 {
            let answer = self.complete(id).await;
            match answer.status {
                200 => return answer,
                202 | 503 => tokio::time::sleep(Duration::from_millis(250)).await,
                _ => panic!("{}", answer.text),
            }
        }
        panic!("{id} never ended: {}", self.upload(id).await.text);
    }

    /// Opens and puts, ready to be completed.
    pub(crate) async fn put_up(&self, content: &[u8], more: Value) -> Answer {
        let opened = self.open(content, more).await.expect(201);
        match opened.json["mode"].as_str() {
            Some("single") => drop(self.put(&opened.json["upload"], content).await.expect(200)),
            _ => self.put_parts(&opened.json["parts"], content).await,
        }
        opened
    }
}
