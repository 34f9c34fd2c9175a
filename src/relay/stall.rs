//! Whom Kafka blames for a batch that failed, and what is said when a shard publishes nothing.

use std::collections::BTreeMap;

use tracing::{info, warn};
use uuid::Uuid;

use super::{Carrier, Error};
use crate::kafka::Refusal;
use crate::store::Waiting;

impl Carrier {
    /// The rows of a batch to park: a refused topic's, those that are surely at fault, and one that was sent alone.
    pub(super) fn blamed(&self, refused: &[Refusal], sent: &[Uuid], rows: &[Waiting]) -> Vec<Refusal> {
        let topic_of = |id: &Uuid| rows.iter().find(|row| row.session_id == *id).map(|row| row.topic.as_str());
        let mut topics: BTreeMap<&str, &str> = BTreeMap::new();
        for refusal in refused.iter().filter(|refusal| refusal.whole_topic) {
            topics.extend(topic_of(&refusal.upload_id).map(|topic| (topic, refusal.reason.as_str())));
        }
        for (topic, reason) in &topics {
            self.isolation.refused_topic(topic, reason);
        }
        let of_topics = rows.iter().filter_map(|row| {
            let reason = (*topics.get(row.topic.as_str())?).to_owned();
            Some(Refusal { upload_id: row.session_id, permanent: true, whole_topic: true, reason })
        });
        let alone = refused.iter().filter(|refusal| !refusal.whole_topic && (refusal.permanent || sent.len() == 1));
        of_topics.chain(alone.cloned()).collect()
    }

    /// Logs why a batch failed: once a shard and reason, and from time to time again.
    pub(super) fn tell_failure(&self, shard: i32, why: &str) {
        if self.is_news(&format!("shard {shard}"), why) {
            warn!(shard, why, "publishing a batch of shard {shard} failed, and it is tried again: {why}");
        }
    }

    /// Notes why nothing of these shards is published, and says so on the uploads that wait.
    pub(super) async fn tell_stalled(&self, shards: std::ops::Range<i32>, why: &Error) {
        for shard in shards {
            self.isolation.stalled_by(shard, &why.to_string());
            self.tell_stall(shard).await;
        }
    }

    /// Says on the uploads that wait for a shard why it has published nothing for a while, if so.
    pub(super) async fn tell_stall(&self, shard: i32) {
        let Some((reason, after)) = self.isolation.stall_to_tell(shard) else { return };
        let told = async {
            let now = self.store.now().await?;
            self.store.tell_waiting(shard, &without_addresses(&reason), after, now).await
        };
        match told.await {
            Ok((ids, number)) => {
                ids.into_iter().for_each(|id| self.wakes.changed(id));
                self.isolation.told_to(shard, number);
            }
            Err(error) => info!(shard, %error, "could not write down why the uploads of shard {shard} wait: {error}"),
        }
    }
}

/// What Kafka said, as it may be shown to a client: `host:port` is not.
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
    fn no_address_is_told() {
        for (reason, told) in [
            ("127.0.0.1:9092/1: Connect refused", "(address) Connect refused"),
            ("kafka is unreachable: no answer within 1500 ms", "kafka is unreachable: no answer within 1500 ms"),
            ("on broker (kafka-1.internal:9092) now", "on broker (address) now"),
        ] {
            assert_eq!(without_addresses(reason), told);
        }
    }
}
