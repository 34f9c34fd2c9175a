//! Where records can go, found out from Kafka's metadata before anything of a batch is sent.
//!
//! librdkafka would find out too, but later: it cannot tell a topic that is gone from one that it has not heard of yet,
//! and fails a whole transaction for one record.

use std::collections::{HashMap, HashSet};

use super::topics::Layout;
use super::{Error, Kafka, PublishError, Record, Refusal};

/// A batch, sorted by what can be sent now.
#[derive(Debug, Default)]
pub struct Placing {
    /// What has a place, in the order it was given. A record that comes after a refused one of its topic and key is
    /// not among them: it would arrive before it.
    pub records: Vec<Record>,
    /// What has none. Nothing helps until somebody changes Kafka.
    pub refused: Vec<Refusal>,
}

impl Kafka {
    /// Finds the records for a topic or partition that Kafka lacks.
    ///
    /// # Errors
    /// [`PublishError::Retry`] when Kafka does not answer.
    pub async fn place(&self, records: Vec<Record>) -> Result<Placing, PublishError> {
        let mut topics: HashMap<String, Result<Option<Layout>, Error>> = HashMap::new();
        let mut waiting: HashSet<(String, Vec<u8>)> = HashSet::new();
        let mut placing = Placing::default();
        for record in records {
            if !topics.contains_key(&record.topic) {
                let found = match self.layout(&record.topic).await {
                    Err(Error::Unreachable(reason)) => return Err(PublishError::Retry(reason)),
                    found => found,
                };
                topics.insert(record.topic.clone(), found);
            }
            let order = record.key.clone().map(|key| (record.topic.clone(), key));
            if order.as_ref().is_some_and(|order| waiting.contains(order)) {
                continue;
            }
            match refusal(&record, &topics[&record.topic]) {
                None => placing.records.push(record),
                Some(reason) => {
                    waiting.extend(order);
                    placing.refused.push(Refusal { upload_id: record.upload_id, permanent: true, reason });
                }
            }
        }
        Ok(placing)
    }
}

/// Why a record has no place in its topic.
fn refusal(record: &Record, topic: &Result<Option<Layout>, Error>) -> Option<String> {
    let name = &record.topic;
    match topic {
        Err(error) => Some(error.to_string()),
        Ok(None) => Some(format!("kafka has no topic {name}")),
        Ok(Some(Layout { partitions })) => {
            let missing = record.partition.filter(|partition| !(0..*partitions).contains(partition))?;
            Some(format!("topic {name} has {partitions} partitions, none with number {missing}"))
        }
    }
}
