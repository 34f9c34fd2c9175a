//! Decides which rows of a failed batch are deferred, and reports why a shard publishes nothing.

use std::collections::BTreeMap;

use tracing::{info, warn};
use uuid::Uuid;

use super::{Error, ShardPublisher};
use crate::kafka::RecordRejection;
use crate::store::OutboxRow;

impl ShardPublisher {
    /// The rows of a batch to defer: all rows of a rejected topic, rows that are certainly at fault, and a row that was
    /// sent alone.
    pub(super) fn rows_to_defer(&self, rejected: &[RecordRejection], sent: &[Uuid], rows: &[OutboxRow]) -> Vec<RecordRejection> {
        let topic_of = |id: &Uuid| rows.iter().find(|row| row.session_id == *id).map(|row| row.topic.as_str());
        let mut topics: BTreeMap<&str, &str> = BTreeMap::new();
        for rejection in rejected.iter().filter(|rejection| rejection.whole_topic) {
            topics.extend(topic_of(&rejection.upload_id).map(|topic| (topic, rejection.reason.as_str())));
        }
        for (topic, reason) in &topics {
            self.isolation.record_rejected_topic(topic, reason);
        }
        let of_topics = rows.iter().filter_map(|row| {
            let reason = (*topics.get(row.topic.as_str())?).to_owned();
            Some(RecordRejection { upload_id: row.session_id, permanent: true, whole_topic: true, reason })
        });
        let alone = rejected.iter().filter(|rejection| !rejection.whole_topic && (rejection.permanent || sent.len() == 1));
        of_topics.chain(alone.cloned()).collect()
    }

    /// Logs why a batch failed. The same reason of a shard is logged once a minute at most.
    pub(super) fn log_failure(&self, shard: i32, why: &str) {
        if self.should_log(&format!("shard {shard}"), why) {
            warn!(shard, why, "publishing a batch of shard {shard} failed: {why}; retrying until it succeeds");
        }
    }

    /// Records why these shards publish nothing, and writes the reason to their waiting uploads.
    pub(super) async fn report_stalled(&self, shards: std::ops::Range<i32>, error: &Error) {
        for shard in shards {
            self.isolation.record_stall(shard, &error.to_string());
            self.report_stall(shard).await;
        }
    }

    /// If a shard has published nothing for a while, writes the reason to the uploads that wait for it.
    pub(super) async fn report_stall(&self, shard: i32) {
        let Some((reason, after)) = self.isolation.stall_to_report(shard) else { return };
        let written = async {
            let now = self.store.now().await?;
            self.store.write_stall_reason(shard, &without_addresses(&reason), after, now).await
        };
        match written.await {
            Ok((ids, number)) => {
                ids.into_iter().for_each(|id| self.notifier.notify(id));
                self.isolation.set_reported_up_to(shard, number);
            }
            Err(error) => info!(
                shard,
                %error,
                "could not write to the waiting uploads of shard {shard} why nothing is published: {error}; retrying"
            ),
        }
    }
}

/// Kafka's error text without `host:port` addresses, because clients can read it.
fn without_addresses(reason: &str) -> String {
    let is_address = |word: &str| {
        let mut pieces = word.trim_matches(|c: char| !c.is_ascii_alphanumeric()).rsplitn(2, ':');
        let port = pieces.next().unwrap_or_default().split('/').next().unwrap_or_default();
        pieces.next().is_some_and(|host| !host.is_empty()) && !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit())
    };
    let words = reason.split(' ').map(|word| if is_address(word) { "(address)" } else { word });
    words.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_that_a_client_reads_contains_no_address() {
        for (reason, expected) in [
            ("127.0.0.1:9092/1: Connect refused", "(address) Connect refused"),
            ("kafka is unreachable: no answer within 1500 ms", "kafka is unreachable: no answer within 1500 ms"),
            ("on broker (kafka-1.internal:9092) now", "on broker (address) now"),
        ] {
            assert_eq!(without_addresses(reason), expected);
        }
    }
}
