//! A `House`: one broker with a database, a bucket and a topic of its own, and everything a test asks of them.

pub(crate) mod faults;
pub(crate) mod process;
pub(crate) mod proxy;
pub(crate) mod raw;
pub(crate) mod servers;
pub(crate) mod serving;
pub(crate) mod tokens;
pub(crate) mod uploads;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region};
use lfs_broker::app;
use lfs_broker::kafka::Delivery;
use lfs_broker::store;
use lfs_broker::{auth, broker, finish, http, kafka, objects, policy, sweeper};
use lfs_broker_client::Client;
use lfs_broker_client::api::SignedRequest;
use lfs_broker_client::checksum::Sha256;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::RDKafkaErrorCode::{AllBrokersDown, BrokerTransportFailure};
use rdkafka::message::{Headers as _, Message as _};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use serde_json::{Value, json};
use sqlx::PgPool;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use process::Process;
use servers::servers;
use uploads::lost_its_directory;

/// One broker, and what is around it.
pub(crate) struct House {
    /// The settings it was started with; a restart uses them again.
    pub(crate) settings: app::Settings,
    /// A topic that only this house uses, with three partitions.
    pub(crate) topic: String,
    pub(crate) bucket: String,
    pub(crate) db: PgPool,
    pub(crate) s3: aws_sdk_s3::Client,
    pub(crate) http: reqwest::Client,
    process: Option<Process>,
    /// How far the clock is pushed: a broker that is started again goes on from there.
    pushed_ms: AtomicU64,
}

/// A record as a consumer that is not ours sees it.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    pub(crate) partition: i32,
    pub(crate) offset: i64,
    pub(crate) timestamp_ms: i64,
    pub(crate) key: Option<Vec<u8>>,
    pub(crate) value: Vec<u8>,
    pub(crate) headers: Vec<(String, String)>,
}

/// An HTTP answer, read whole.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: reqwest::header::HeaderMap,
    pub(crate) json: Value,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) fn code(&self) -> &str {
        self.json["code"].as_str().unwrap_or_default()
    }

    pub(crate) fn state(&self) -> &str {
        self.json["state"].as_str().unwrap_or_default()
    }

    pub(crate) fn id(&self) -> String {
        self.json["id"].as_str().unwrap_or_else(|| panic!("no id in {}", self.text)).to_owned()
    }

    /// Asserts the status and gives the answer back.
    #[track_caller]
    pub(crate) fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{}", self.text);
        self
    }

    /// Asserts that it is a problem of this status and code, in the form of RFC 9457.
    #[track_caller]
    pub(crate) fn expect_problem(self, status: u16, code: &str) -> Self {
        assert_eq!((self.status, self.code()), (status, code), "{}", self.text);
        assert_eq!(self.headers["content-type"], "application/problem+json");
        assert_eq!(self.json["status"], status);
        assert_eq!(self.json["type"], format!("/problems/{code}"));
        assert_eq!(self.json["request_id"].as_str().unwrap(), self.headers["x-request-id"].to_str().unwrap());
        for secret in servers().secrets() {
            assert!(!self.text.contains(&secret), "{secret} is in {}", self.text);
        }
        self
    }
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::of(bytes).to_string()
}

/// Bytes that no compression or zero page hides, the same for the same seed.
pub(crate) fn bytes(length: usize, seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; length];
    random.fill(&mut bytes);
    bytes
}

/// A time of an answer, which is in UTC.
pub(crate) fn time(value: &Value) -> OffsetDateTime {
    let text = value.as_str().expect("a time");
    assert!(text.ends_with('Z'), "{text} is not in UTC");
    OffsetDateTime::parse(text, &Rfc3339).expect("a time of RFC 3339")
}

impl House {
    pub(crate) async fn new() -> Self {
        Self::with(|_| {}).await
    }

    /// A house whose settings are changed before it starts.
    pub(crate) async fn with(change: impl FnOnce(&mut app::Settings)) -> Self {
        let servers = servers();
        let url = servers.database().await;
        let bucket = format!("it-{}", Uuid::new_v4().simple());
        let mut settings = app::Settings {
            listen: ([127, 0, 0, 1], 0).into(),
            public_url: None,
            cors_origins: Vec::new(),
            // A machine that is busy with tests may be slow; what a caller hears in time has tests of its own.
            store: store::Settings { max_connections: 8, answer_within: Duration::from_secs(15), ..store::Settings::new(&url) },
            objects: objects::Settings {
                bucket: Some(bucket.clone()),
                endpoint: Some(servers.s3.endpoint.clone()),
                region: Some("us-east-1".into()),
                access_key_id: Some(servers.s3.access_key_id.clone()),
                secret_access_key: Some(servers.s3.secret_access_key.clone()),
                ..objects::Settings::default()
            },
            kafka: kafka::Settings {
                bootstrap_servers: servers.kafka.clone(),
                properties: BTreeMap::new(),
                delivery: if servers.real_kafka { Delivery::ExactlyOnce } else { Delivery::AtLeastOnce },
                create_topics: false,
            },
            http: http::Settings::default(),
            auth: auth::Settings { mode: auth::Mode::None, ..auth::Settings::default() },
            policy: policy::Settings { default_enabled: true, ..policy::Settings::default() },
            broker: broker::Settings { complete_wait: Duration::from_secs(20), ..broker::Settings::default() },
            finish: finish::Settings::default(),
            // Tests that want a sweep push the clock and wake the sweeper by an abort, or set this lower.
            sweeper: sweeper::Settings { every: Duration::from_millis(200), ..sweeper::Settings::default() },
        };
        change(&mut settings);
        let s3 = s3_client(&settings.objects);
        s3.create_bucket().bucket(&bucket).send().await.expect("a bucket is made");
        let process = Some(Process::start(&settings, Duration::ZERO).await);
        let db = PgPool::connect(&url).await.unwrap();
        let http = reqwest::Client::builder().timeout(Duration::from_secs(60)).build().unwrap();
        let topic = format!("it-{}", Uuid::new_v4().simple());
        let house = Self { settings, topic, bucket, db, s3, http, process, pushed_ms: AtomicU64::new(0) };
        house.make_topic(&house.topic, 3).await;
        house
    }

    /// Makes a topic in Kafka, and waits until it can be seen.
    pub(crate) async fn make_topic(&self, topic: &str, partitions: i32) {
        servers::make_topic(topic, partitions).await;
        let topic = topic.to_owned();
        tokio::task::spawn_blocking(move || {
            let consumer = consumer();
            let begun = std::time::Instant::now();
            loop {
                // A Kafka on a machine that is busy with tests may answer late.
                let metadata = consumer.fetch_metadata(Some(&topic), Duration::from_secs(5));
                if metadata.as_ref().is_ok_and(|metadata| {
                    metadata.topics().iter().any(|found| found.name() == topic && found.partitions().len() == partitions as usize)
                }) {
                    return;
                }
                assert!(begun.elapsed() < Duration::from_secs(60), "topic {topic} did not appear: {:?}", metadata.err());
                std::thread::sleep(Duration::from_millis(50));
            }
        })
        .await
        .unwrap();
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.process.as_ref().expect("the broker runs").address())
    }

    /// The real client.
    pub(crate) fn client(&self) -> Client {
        Client::new(&self.url()).unwrap()
    }

    pub(crate) async fn send(&self, request: reqwest::RequestBuilder) -> Answer {
        let response = request.send().await.expect("the broker answers");
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let text = response.text().await.unwrap();
        Answer { status, headers, json: serde_json::from_str(&text).unwrap_or(Value::Null), text }
    }

    /// A request of any kind, to be given headers and a body.
    pub(crate) fn request(&self, method: &str, path: &str) -> reqwest::RequestBuilder {
        self.http.request(method.parse().unwrap(), format!("{}{path}", self.url()))
    }

    /// Sends a body as it is, under `application/json`.
    pub(crate) async fn send_json(&self, method: &str, path: &str, body: impl Into<reqwest::Body>) -> Answer {
        self.send(self.request(method, path).header("content-type", "application/json").body(body)).await
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(self.http.get(format!("{}{path}", self.url()))).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(self.http.post(format!("{}{path}", self.url())).json(body)).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Answer {
        self.send(self.http.delete(format!("{}{path}", self.url()))).await
    }

    pub(crate) async fn put_policy(&self, topic: &str, policy: &Value) -> Answer {
        self.send(self.http.put(format!("{}/lfs/topics/{topic}", self.url())).json(policy)).await
    }

    /// Opens an upload of these bytes to the house's topic; `more` adds or replaces members.
    pub(crate) async fn open(&self, content: &[u8], more: Value) -> Answer {
        let mut body = json!({"topic": self.topic, "size": content.len(), "sha256": sha256(content)});
        for (name, value) in more.as_object().expect("an object") {
            match value {
                Value::Null => body.as_object_mut().unwrap().remove(name),
                value => body.as_object_mut().unwrap().insert(name.clone(), value.clone()),
            };
        }
        self.post("/lfs/uploads", &body).await
    }

    /// Sends bytes by a signed request, as a client that knows nothing else would.
    pub(crate) async fn put(&self, request: &Value, content: &[u8]) -> Answer {
        let mut answer = self.put_once(request, content).await;
        for _ in 0..20 {
            if !lost_its_directory(answer.status, &answer.text) {
                break;
            }
            answer = self.put_once(request, content).await;
        }
        answer
    }

    async fn put_once(&self, request: &Value, content: &[u8]) -> Answer {
        let signed: SignedRequest = serde_json::from_value(request.clone()).unwrap_or_else(|error| panic!("{error}: {request}"));
        let mut put = self.http.put(&signed.url).body(content.to_vec());
        for (name, value) in &signed.headers {
            // It follows from the body, but this client leaves it out where the body is empty.
            if name != "content-length" || content.is_empty() {
                put = put.header(name, value);
            }
        }
        self.send(put).await
    }

    /// Puts every part of an answer that has them.
    pub(crate) async fn put_parts(&self, parts: &Value, content: &[u8]) {
        for part in parts.as_array().expect("parts") {
            let (offset, size) = (part["offset"].as_u64().unwrap() as usize, part["size"].as_u64().unwrap() as usize);
            self.put(part, &content[offset..offset + size]).await.expect(200);
        }
    }

    pub(crate) async fn complete(&self, id: &str) -> Answer {
        self.post(&format!("/lfs/uploads/{id}/complete"), &json!({})).await
    }

    /// Opens, puts in one PUT, and completes; asserts that it was published.
    pub(crate) async fn publish(&self, content: &[u8], more: Value) -> Answer {
        let opened = self.open(content, more).await.expect(201);
        self.put(&opened.json["upload"], content).await.expect(200);
        self.complete(&opened.id()).await.expect(200)
    }

    pub(crate) async fn upload(&self, id: &str) -> Answer {
        self.get(&format!("/lfs/uploads/{id}")).await
    }

    /// Waits, by the API's own long-poll, until the upload is in this state.
    pub(crate) async fn until(&self, id: &str, state: &str) -> Answer {
        let mut found = self.upload(id).await;
        for _ in 0..30 {
            if found.state() == state {
                return found;
            }
            let version = &found.json["version"];
            found = self.get(&format!("/lfs/uploads/{id}?wait=5&version={version}")).await;
        }
        panic!("{id} never became {state}: {}", found.text);
    }

    /// Waits until `true`; a condition that never holds fails the test.
    pub(crate) async fn eventually<F: Future<Output = bool>>(&self, what: &str, mut holds: impl FnMut() -> F) {
        for _ in 0..150 {
            if holds().await {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("never: {what}");
    }

    /// Pushes the broker's clock.
    pub(crate) fn push_clock(&self, by: Duration) {
        self.pushed_ms.fetch_add(u64::try_from(by.as_millis()).unwrap(), Ordering::Relaxed);
        self.process.as_ref().expect("the broker runs").push_clock(by);
    }

    fn pushed(&self) -> Duration {
        Duration::from_millis(self.pushed_ms.load(Ordering::Relaxed))
    }

    /// Every committed record of a topic, by partition and offset, read by a plain consumer.
    pub(crate) async fn records(&self, topic: &str) -> Vec<Record> {
        let topic = topic.to_owned();
        tokio::task::spawn_blocking(move || read_all(&topic)).await.unwrap()
    }

    /// The keys of all objects in the bucket.
    pub(crate) async fn objects(&self) -> Vec<String> {
        let page = self.s3.list_objects_v2().bucket(&self.bucket).send().await.unwrap();
        page.contents().iter().filter_map(|object| object.key().map(str::to_owned)).collect()
    }

    /// Whether S3 knows an open multipart upload for this object's key.
    pub(crate) async fn has_open_multipart(&self, object_key: &str) -> bool {
        let page = self.s3.list_multipart_uploads().bucket(&self.bucket).prefix(object_key).send().await.unwrap();
        !page.uploads().is_empty()
    }

    /// Ends the broker in order and starts it again, with changed settings.
    pub(crate) async fn restart(&mut self, change: impl FnOnce(&mut app::Settings)) {
        self.process.take().expect("the broker runs").stop().await;
        self.start(change).await;
    }

    /// Drops the broker as a crash would, and starts another.
    pub(crate) async fn crash(&mut self, change: impl FnOnce(&mut app::Settings)) {
        self.process.take().expect("the broker runs").crash();
        self.start(change).await;
    }

    pub(crate) async fn start(&mut self, change: impl FnOnce(&mut app::Settings)) {
        change(&mut self.settings);
        self.process = Some(Process::start(&self.settings, self.pushed()).await);
    }

    /// Ends the broker in order; what follows is done to what is around it, until [`House::start`].
    pub(crate) async fn stop(&mut self) {
        self.process.take().expect("the broker runs").stop().await;
    }

    /// A second replica on the same database, S3 and Kafka.
    pub(crate) async fn replica(&self) -> Process {
        Process::start(&self.settings, self.pushed()).await
    }
}

fn s3_client(settings: &objects::Settings) -> aws_sdk_s3::Client {
    let credentials = Credentials::new(
        settings.access_key_id.clone().unwrap(),
        settings.secret_access_key.clone().unwrap(),
        None,
        None,
        "tests",
    );
    let config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .endpoint_url(settings.public_endpoint.clone().or(settings.endpoint.clone()).unwrap())
        .region(Region::new("us-east-1"))
        .credentials_provider(credentials)
        .force_path_style(true)
        .build();
    aws_sdk_s3::Client::from_conf(config)
}

fn consumer() -> BaseConsumer {
    ClientConfig::new()
        .set("bootstrap.servers", &servers().kafka)
        .set("group.id", "it")
        .set("isolation.level", "read_committed")
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        // The end of a partition is told when a fetch comes back empty: by default half a second later.
        .set("fetch.wait.max.ms", "10")
        .create()
        .expect("a consumer is made")
}

fn read_all(topic: &str) -> Vec<Record> {
    let consumer = consumer();
    let metadata = consumer.fetch_metadata(Some(topic), Duration::from_secs(10)).expect("Kafka answers");
    let partitions: Vec<i32> = metadata.topics()[0].partitions().iter().map(|partition| partition.id()).collect();
    let mut assignment = TopicPartitionList::new();
    for partition in &partitions {
        assignment.add_partition_offset(topic, *partition, Offset::Beginning).unwrap();
    }
    consumer.assign(&assignment).unwrap();
    let (mut records, mut ended) = (Vec::new(), 0);
    let deadline = Instant::now() + Duration::from_secs(60);
    while ended < partitions.len() {
        assert!(Instant::now() < deadline, "{topic} was not read in a minute");
        match consumer.poll(Duration::from_secs(10)).expect("Kafka answers in time") {
            Err(rdkafka::error::KafkaError::PartitionEOF(_)) => ended += 1,
            // On a busy machine a connection may be late; librdkafka comes back by itself.
            Err(error) if matches!(error.rdkafka_error_code(), Some(AllBrokersDown | BrokerTransportFailure)) => {}
            Err(error) => panic!("{error}"),
            Ok(message) => records.push(Record {
                partition: message.partition(),
                offset: message.offset(),
                timestamp_ms: message.timestamp().to_millis().expect("a record has a time"),
                key: message.key().map(<[u8]>::to_vec),
                value: message.payload().unwrap_or_default().to_vec(),
                headers: message.headers().map_or_else(Vec::new, |headers| {
                    headers
                        .iter()
                        .map(|h| (h.key.to_owned(), String::from_utf8_lossy(h.value.unwrap_or_default()).into_owned()))
                        .collect()
                }),
            }),
        }
    }
    records.sort_by_key(|record| (record.partition, record.offset));
    records
}
