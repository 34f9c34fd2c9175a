//! `topics`: policies through the API of any broker.

use clap::Subcommand;
use lfs_broker_client::Client;
use lfs_broker_client::api::{ListTopics, Policy};

use super::{Error, talk};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The broker
    #[arg(long, env = "LFS_BROKER_URL", default_value = "http://127.0.0.1:8080", global = true)]
    broker: String,
    /// A bearer token
    #[arg(long, env = "LFS_BROKER_TOKEN", hide_env_values = true, global = true)]
    token: Option<String>,
    /// Print JSON for machines, which is what it prints anyway
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// List stored policies, one JSON line each
    List,
    /// Print a topic's policy
    Get {
        /// The topic
        topic: String,
    },
    /// Store a topic's policy, given as JSON; what is left out gets its default
    Set {
        /// The topic
        topic: String,
        /// The policy
        #[arg(default_value = "{}")]
        policy: String,
    },
    /// Forget a topic's policy
    Delete {
        /// The topic
        topic: String,
    },
}

pub(super) async fn topics(arguments: Arguments) -> Result<(), Error> {
    let mut client = Client::new(&arguments.broker)?;
    if let Some(token) = arguments.token {
        client = client.with_token(token);
    }
    match arguments.verb {
        Verb::List => {
            let mut cursor = None;
            loop {
                let page = client.topics(&ListTopics { limit: None, cursor }).await?;
                for item in page.items {
                    talk::data(&talk::json(&item))?;
                }
                cursor = page.next_cursor;
                if cursor.is_none() {
                    return Ok(());
                }
            }
        }
        Verb::Get { topic } => talk::data(&talk::json(&client.topic(&topic).await?))?,
        Verb::Set { topic, policy } => {
            let policy: serde_json::Value =
                serde_json::from_str(&policy).map_err(|error| Error::Usage(format!("the policy is not JSON: {error}")))?;
            let stored: Policy = client.put_topic(&topic, &policy).await?;
            talk::data(&talk::json(&stored))?;
        }
        Verb::Delete { topic } => client.delete_topic(&topic).await?,
    }
    Ok(())
}
