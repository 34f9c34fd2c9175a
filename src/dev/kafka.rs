//! A Kafka for one machine: librdkafka's mock cluster, which clients based on librdkafka produce to and consume from.
//!
//! It lives in memory, keeps the newest 5 MB of a partition, and accepts transactions without their meaning: what is
//! aborted stays visible. So `dev` publishes at least once, and puts back from the session table what was published.

use std::sync::mpsc;
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::mocking::MockCluster;
use rdkafka::producer::{DefaultProducerContext, FutureProducer, FutureRecord};
use tokio::sync::oneshot;

use crate::kafka::Record;

/// The header of a record that only keeps an offset taken; it has neither key nor value.
pub const GAP_HEADER: &str = "lfs-dev-gap";

/// As many partitions as the mock cluster gives a topic that is made on first use.
const PARTITIONS: i32 = 4;

/// A partition that has lost more than this is not what `dev` is for.
const MOST_GAPS: i64 = 1_000_000;

/// Records that are put back at a time: librdkafka's queue holds 100,000.
const RESTORED_AT_A_TIME: usize = 10_000;

/// The server is in this process, so it answers in milliseconds or not at all.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// Why the embedded Kafka failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The mock cluster's thread is gone.
    #[error("the embedded kafka has stopped")]
    Stopped,
    /// librdkafka said no.
    #[error("embedded kafka: {0}")]
    Kafka(#[from] KafkaError),
    /// Records are put back before anything else is published, in the order of their offsets.
    #[error("cannot put offset {offset} back into {topic}/{partition}: the next offset is {next}")]
    Taken {
        /// The topic.
        topic: String,
        /// Its partition.
        partition: i32,
        /// The record's offset.
        offset: i64,
        /// Where the partition ends already.
        next: i64,
    },
    /// Too many records would have to be made up.
    #[error("{topic}/{partition} starts at offset {offset}, too far from {next} (at most {MOST_GAPS} are made up)")]
    Gap {
        /// The topic.
        topic: String,
        /// Its partition.
        partition: i32,
        /// The record's offset.
        offset: i64,
        /// Where the partition ends.
        next: i64,
    },
}

/// A record that was published before the embedded Kafka was started anew.
#[derive(Debug, Clone)]
pub struct Kept {
    /// Where it was.
    pub offset: i64,
    /// Its time in milliseconds since 1970.
    pub timestamp_ms: i64,
    /// What it was. Its topic and partition are those it is put back into.
    pub record: Record,
}

type Cluster = MockCluster<'static, DefaultProducerContext>;
type Command = Box<dyn FnOnce(&Cluster) + Send>;

/// The embedded Kafka. It stops when this is dropped.
pub struct Server {
    bootstrap_servers: String,
    commands: mpsc::Sender<Command>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Server {
    /// Starts it on a free port of 127.0.0.1.
    pub fn start() -> Result<Self, Error> {
        let (commands, received) = mpsc::channel::<Command>();
        let (started, starting) = mpsc::channel();
        // The cluster is bound to the thread that made it.
        let thread = std::thread::spawn(move || match MockCluster::new(1) {
            Ok(cluster) => {
                // Whoever waits may be gone already; then `received` ends at once.
                drop(started.send(Ok(cluster.bootstrap_servers())));
                received.iter().for_each(|command| command(&cluster));
            }
            Err(error) => drop(started.send(Err(error))),
        });
        let bootstrap_servers = starting.recv().map_err(|_| Error::Stopped)??;
        Ok(Self { bootstrap_servers, commands, thread: Some(thread) })
    }

    /// `127.0.0.1:PORT`
    pub fn bootstrap_servers(&self) -> String {
        self.bootstrap_servers.clone()
    }

    /// Makes a topic; one that exists stays as it is.
    pub async fn create_topic(&self, name: &str, partitions: i32) -> Result<(), Error> {
        let name = name.to_owned();
        match self.run(move |cluster| cluster.create_topic(&name, partitions, 1)).await {
            Err(Error::Kafka(KafkaError::MockCluster(RDKafkaErrorCode::TopicAlreadyExists))) => Ok(()),
            created => created,
        }
    }

    /// Puts records back at their offsets, which must ascend. An offset that is missing between them gets a record
    /// without a value and with the header [`GAP_HEADER`]. A topic that is missing gets four partitions.
    pub async fn restore(&self, topic: &str, partition: i32, records: Vec<Kept>) -> Result<(), Error> {
        self.create_topic(topic, PARTITIONS).await?;
        let producer = self.client().create::<FutureProducer>()?;
        let mut next = self.end(topic, partition).await?;
        let mut waiting = Vec::new();
        for kept in records {
            let (topic, offset) = (topic.to_owned(), kept.offset);
            if offset < next {
                return Err(Error::Taken { topic, partition, offset, next });
            }
            if offset - next > MOST_GAPS {
                return Err(Error::Gap { topic, partition, offset, next });
            }
            for _ in next..offset {
                let header = OwnedHeaders::new().insert(Header { key: GAP_HEADER, value: Some("") });
                let gap = FutureRecord::<(), ()>::to(&topic).partition(partition).headers(header);
                waiting.push(producer.send_result(gap.timestamp(kept.timestamp_ms)).map_err(|(error, _)| error)?);
                settle(&mut waiting, RESTORED_AT_A_TIME).await?;
            }
            let headers = kept
                .record
                .headers
                .iter()
                .fold(OwnedHeaders::new(), |headers, (key, value)| headers.insert(Header { key, value: Some(value) }));
            let record = FutureRecord {
                topic: &topic,
                partition: Some(partition),
                payload: Some(&kept.record.value),
                key: kept.record.key.as_ref(),
                timestamp: Some(kept.timestamp_ms),
                headers: Some(headers),
            };
            waiting.push(producer.send_result(record).map_err(|(error, _)| error)?);
            settle(&mut waiting, RESTORED_AT_A_TIME).await?;
            next = offset + 1;
        }
        settle(&mut waiting, 1).await
    }

    /// Ends all connections and refuses new ones, as a Kafka that was stopped. What it holds is kept.
    pub async fn down(&self) -> Result<(), Error> {
        self.run(|cluster| cluster.broker_down(-1)).await
    }

    /// Comes back from [`Server::down`].
    pub async fn up(&self) -> Result<(), Error> {
        self.run(|cluster| cluster.broker_up(-1)).await
    }

    /// Takes a partition's leader away, as when the only broker that holds it is gone, or gives it one back.
    pub async fn lead(&self, topic: &str, partition: i32, led: bool) -> Result<(), Error> {
        let topic = topic.to_owned();
        self.run(move |cluster| cluster.partition_leader(&topic, partition, led.then_some(1))).await
    }

    /// Refuses a topic to everybody, as a Kafka with ACLs does, or takes it again.
    pub async fn refuse_topic(&self, topic: &str, refused: bool) -> Result<(), Error> {
        use rdkafka::types::RDKafkaRespErr::{RD_KAFKA_RESP_ERR_NO_ERROR, RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED};
        let error = if refused { RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED } else { RD_KAFKA_RESP_ERR_NO_ERROR };
        let topic = topic.to_owned();
        self.run(move |cluster| cluster.topic_error(&topic, error)).await
    }

    /// Stops it; everything in it is gone.
    pub fn stop(self) {
        drop(self);
    }

    async fn run<F>(&self, command: F) -> Result<(), Error>
    where
        F: FnOnce(&Cluster) -> Result<(), KafkaError> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        // Nobody waiting for the answer is no reason not to do it.
        let command: Command = Box::new(move |cluster| drop(answer.send(command(cluster))));
        self.commands.send(command).map_err(|_| Error::Stopped)?;
        Ok(answered.await.map_err(|_| Error::Stopped)??)
    }

    async fn end(&self, topic: &str, partition: i32) -> Result<i64, Error> {
        let (config, topic) = (self.client(), topic.to_owned());
        let end = tokio::task::spawn_blocking(move || {
            let consumer = config.create::<BaseConsumer>()?;
            consumer.fetch_watermarks(&topic, partition, ANSWER_WITHIN).map(|(_, end)| end)
        });
        Ok(end.await.map_err(|_| Error::Stopped)??)
    }

    fn client(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", &self.bootstrap_servers)
            .set("message.timeout.ms", ANSWER_WITHIN.as_millis().to_string())
            // In the order they are sent, also when one has to be sent again: their offsets are promised.
            .set("enable.idempotence", "true");
        config
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The thread ends with its last command; joining it makes "stopped" mean stopped.
        self.commands = mpsc::channel().0;
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// Awaits the acknowledgements once there are `enough` of them.
async fn settle(waiting: &mut Vec<rdkafka::producer::DeliveryFuture>, enough: usize) -> Result<(), Error> {
    if waiting.len() >= enough {
        for delivery in waiting.drain(..) {
            delivery.await.map_err(|_| Error::Stopped)?.map_err(|(error, _)| error)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use rdkafka::message::{Headers, Message, OwnedMessage};
    use uuid::Uuid;

    use super::*;

    /// A plain consumer of a group, as anybody would write one.
    fn consume(server: &Server, topic: &str, count: usize) -> Vec<OwnedMessage> {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", server.bootstrap_servers())
            .set("group.id", "anybody")
            .set("auto.offset.reset", "earliest")
            .create()
            .unwrap();
        consumer.subscribe(&[topic]).unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(30);
        let mut found = Vec::new();
        while found.len() < count {
            assert!(std::time::Instant::now() < deadline, "{} of {count} records", found.len());
            if let Some(Ok(message)) = consumer.poll(Duration::from_millis(100)) {
                found.push(message.detach());
            }
        }
        found
    }

    fn kept(offset: i64) -> Kept {
        let record = Record {
            upload_id: Uuid::now_v7(),
            topic: "videos".into(),
            partition: None,
            key: Some(b"key".to_vec()),
            value: format!("pointer {offset}").into_bytes(),
            headers: vec![("lfs-upload-id".into(), b"id".to_vec())],
        };
        Kept { offset, timestamp_ms: 1_700_000_000_000 + offset, record }
    }

    #[tokio::test]
    async fn records_are_put_back_where_they_were() {
        let server = Server::start().unwrap();
        server.restore("videos", 2, vec![kept(3), kept(4), kept(7)]).await.unwrap();
        let found = consume(&server, "videos", 8);
        for (offset, message) in found.iter().enumerate() {
            assert_eq!((message.partition(), message.offset()), (2, offset as i64));
            let gap = !matches!(offset, 3 | 4 | 7);
            let header = if gap { GAP_HEADER } else { "lfs-upload-id" };
            assert_eq!(message.headers().unwrap().get(0).key, header);
            match message.payload() {
                None => assert!(gap && message.key().is_none()),
                Some(value) => {
                    assert_eq!(value, format!("pointer {offset}").as_bytes());
                    assert_eq!(message.key(), Some(b"key".as_slice()));
                    assert_eq!(message.timestamp().to_millis(), Some(1_700_000_000_000 + offset as i64));
                }
            }
        }
        let taken = server.restore("videos", 2, vec![kept(7)]).await;
        assert!(matches!(taken, Err(Error::Taken { next: 8, .. })), "{taken:?}");
        let far = server.restore("videos", 0, vec![kept(MOST_GAPS + 1)]).await;
        assert!(matches!(far, Err(Error::Gap { next: 0, .. })), "{far:?}");
    }

    #[tokio::test]
    async fn what_it_holds_survives_an_outage() {
        let server = Server::start().unwrap();
        server.restore("videos", 0, vec![kept(0)]).await.unwrap();
        server.down().await.unwrap();
        assert!(std::net::TcpStream::connect(server.bootstrap_servers()).is_err());
        server.up().await.unwrap();
        assert_eq!(consume(&server, "videos", 1).len(), 1);
        let address = server.bootstrap_servers();
        server.stop();
        assert!(std::net::TcpStream::connect(address).is_err());
    }
}
