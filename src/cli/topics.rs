//! `topics`: topic policies, through the API of a broker.

use clap::Subcommand;
use lfs_broker_client::Client;
use lfs_broker_client::api::{ListTopics, Policy};

use super::Error;
use super::output::{print_data, to_json};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The URL of the broker
    #[arg(long, env = "LFS_BROKER_URL", default_value = "http://127.0.0.1:8080", global = true)]
    broker: String,
    /// A bearer token
    #[arg(long, env = "LFS_BROKER_TOKEN", hide_env_values = true, global = true)]
    token: Option<String>,
    /// Accepted for consistency with other commands; the output is always JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// List stored policies, one JSON line each
    List,
    /// Print a topic's policy
    Get {
        /// The topic
        topic: String,
    },
    /// Store a topic's policy, given as JSON; missing members get their defaults
    Set {
        /// The topic
        topic: String,
        /// The policy as JSON
        #[arg(default_value = "{}")]
        policy: String,
    },
    /// Delete a topic's policy
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
    match arguments.command {
        Command::List => {
            let mut cursor = None;
            loop {
                let page = client.topics(&ListTopics { limit: None, cursor }).await?;
                for item in page.items {
                    print_data(&to_json(&item))?;
                }
                cursor = page.next_cursor;
                if cursor.is_none() {
                    return Ok(());
                }
            }
        }
        Command::Get { topic } => print_data(&to_json(&client.topic(&topic).await?))?,
        Command::Set { topic, policy } => {
            let policy: serde_json::Value =
                serde_json::from_str(&policy).map_err(|error| Error::Usage(format!("the policy is not valid JSON: {error}")))?;
            let stored: Policy = client.put_topic(&topic, &policy).await?;
            print_data(&to_json(&stored))?;
        }
        Command::Delete { topic } => client.delete_topic(&topic).await?,
    }
    Ok(())
}
