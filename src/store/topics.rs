//! Stored topic policies.

use lfs_broker_client::api::Policy;
use sqlx::types::Json;
use sqlx::{query, query_scalar};
use time::OffsetDateTime;

use super::{Error, Store, StoredPolicy};

impl Store {
    /// The stored policy of a topic.
    pub(crate) async fn policy(&self, topic: &str) -> Result<Option<Policy>, Error> {
        let policy = query_scalar!(r#"select policy as "policy: Json<Policy>" from topics where topic = $1"#, topic)
            .fetch_optional(&self.pool)
            .await?;
        Ok(policy.map(|Json(policy)| policy))
    }

    /// The stored policy of a topic, with its JSON as the database holds it.
    pub(crate) async fn stored_policy(&self, topic: &str) -> Result<StoredPolicy, Error> {
        let json = query_scalar!("select policy from topics where topic = $1", topic).fetch_optional(&self.pool).await?;
        let policy = json.clone().map(serde_json::from_value).transpose();
        let policy = policy.map_err(|error| Error::Database(sqlx::Error::Decode(error.into())))?;
        Ok(StoredPolicy { policy, json })
    }

    /// Stores a topic's policy and replaces the previous one.
    pub(crate) async fn put_policy(&self, topic: &str, policy: &Policy, now: OffsetDateTime) -> Result<(), Error> {
        query!(
            "insert into topics (topic, policy, updated_at) values ($1, $2, $3)
             on conflict (topic) do update set policy = excluded.policy, updated_at = excluded.updated_at",
            topic,
            Json(policy) as _,
            now
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Deletes a topic's policy, if there is one.
    pub(crate) async fn delete_policy(&self, topic: &str) -> Result<(), Error> {
        query!("delete from topics where topic = $1", topic).execute(&self.pool).await?;
        Ok(())
    }

    /// The bucket of the first stored policy that names one, by topic.
    pub(crate) async fn policy_bucket(&self) -> Result<Option<String>, Error> {
        let bucket = query_scalar!(
            r#"select policy->>'bucket' as "bucket!" from topics where policy->>'bucket' is not null order by topic limit 1"#
        );
        Ok(bucket.fetch_optional(&self.pool).await?)
    }

    /// The buckets that stored policies name, 20 at most.
    pub(crate) async fn policy_buckets(&self) -> Result<Vec<String>, Error> {
        let buckets = "select distinct policy->>'bucket' from topics where policy->>'bucket' is not null order by 1 limit 20";
        Ok(sqlx::query_scalar::<_, String>(buckets).fetch_all(&self.pool).await?)
    }

    /// The KMS keys that policies name for this bucket, 5 at most. A policy without a bucket uses `default_bucket`.
    pub(crate) async fn kms_keys(&self, bucket: &str, default_bucket: &str) -> Result<Vec<String>, Error> {
        let keys = "select distinct policy->>'kms_key_id' from topics
            where policy->>'kms_key_id' is not null and coalesce(policy->>'bucket', $2) = $1 order by 1 limit 5";
        Ok(sqlx::query_scalar::<_, String>(keys).bind(bucket).bind(default_bucket).fetch_all(&self.pool).await?)
    }

    /// Stored policies in order of topic, after topic `after`.
    pub(crate) async fn policies(&self, after: &str, limit: i64) -> Result<Vec<(String, Policy)>, Error> {
        let rows = query!(
            r#"select topic, policy as "policy: Json<Policy>" from topics where topic > $1 order by topic limit $2"#,
            after,
            limit
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(rows.into_iter().map(|row| (row.topic, row.policy.0)).collect())
    }
}
