//! The deliveries of records: awaiting them, and committing only after them.

use std::time::{Duration, Instant};

use rdkafka::Timestamp;
use rdkafka::error::KafkaError;
use rdkafka::producer::future_producer::Delivery as DeliveryReport;
use rdkafka::producer::{BaseProducer, Producer as _};

use super::client::Context;
use super::producer::Acknowledgement;
use super::{Record, RecordMetadata};

/// Commits once librdkafka counts no record as in flight. The count falls a moment after the acknowledgement is passed on, and
/// a commit that still counts one waits in steps of 100 ms.
pub(super) fn commit(producer: &BaseProducer<Context>, timeout: Duration) -> Result<(), KafkaError> {
    let deadline = Instant::now() + Duration::from_millis(100);
    while producer.in_flight_count() > 0 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_micros(100));
    }
    producer.commit_transaction(timeout)
}

/// Awaits the acknowledgements of records that were enqueued.
pub(super) async fn delivered(
    records: impl Iterator<Item = &Record>,
    enqueued: Vec<Result<Acknowledgement, KafkaError>>,
    sent_ms: i64,
) -> Vec<Result<RecordMetadata, KafkaError>> {
    let mut results = Vec::with_capacity(enqueued.len());
    for (record, delivery) in records.zip(enqueued) {
        results.push(delivery_report(delivery).await.map(|report| RecordMetadata {
            upload_id: record.upload_id,
            partition: report.partition,
            offset: report.offset,
            timestamp_ms: timestamp(report.timestamp, sent_ms),
        }));
    }
    results
}

pub(super) async fn delivery_report(delivery: Result<Acknowledgement, KafkaError>) -> Result<DeliveryReport, KafkaError> {
    delivery?.await.unwrap_or(Err(KafkaError::Canceled))
}

/// The timestamp that consumers see: the broker's with `message.timestamp.type=LogAppendTime`, otherwise the one sent.
fn timestamp(reported: Timestamp, sent_ms: i64) -> i64 {
    const DAY_MS: i64 = 86_400_000;
    match reported {
        // librdkafka's mock cluster reports the timestamp 1234 but stores the one that was sent.
        Timestamp::LogAppendTime(at_ms) if at_ms >= sent_ms - DAY_MS => at_ms,
        _ => sent_ms,
    }
}
