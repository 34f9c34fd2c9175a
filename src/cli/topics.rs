//! `topics`: topic policies, through the API of a broker.

use clap::Subcommand;
use lfs_broker_client::api::{ListTopics, Policy};
use lfs_broker_client::{self as client, Client};
use serde_json::Value;

use super::output::{print_data, print_note, to_json};
use super::{Error, connection};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The URL of the broker
    #[arg(long, env = "LFS_BROKER_URL", default_value = "http://127.0.0.1:8080", global = true)]
    pub(super) broker: String,
    /// A bearer token
    #[arg(long, env = "LFS_BROKER_TOKEN", hide_env_values = true, global = true)]
    pub(super) token: Option<String>,
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
    /// Change members of a topic's policy, given as JSON; members that are not given keep their values
    Set {
        /// The topic
        topic: String,
        /// The members to change, as JSON; null resets a member to its default
        #[arg(default_value = "{}")]
        policy: String,
        /// Replace the whole policy; members that are not given get their defaults
        #[arg(long)]
        replace: bool,
    },
    /// Delete a topic's policy
    Delete {
        /// The topic
        topic: String,
    },
}

pub(super) async fn topics(arguments: Arguments) -> Result<(), Error> {
    let client = connection::client(&arguments.broker, arguments.token.as_deref())?;
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
        Command::Set { topic, policy, replace } => set(&client, &topic, &policy, replace).await?,
        Command::Delete { topic } => client.delete_topic(&topic).await?,
    }
    Ok(())
}

async fn set(client: &Client, topic: &str, text: &str, replace: bool) -> Result<(), Error> {
    let members = match serde_json::from_str(text) {
        Ok(Value::Object(members)) => members,
        Ok(_) => return Err(Error::Usage("the policy must be a JSON object such as {\"max_bytes\": 1000000}".to_owned())),
        Err(error) => return Err(Error::Usage(format!("the policy is not valid JSON: {error}"))),
    };
    let refused = |error| with_place(error, text);
    let policy = if replace {
        client.put_topic(topic, &members).await.map_err(refused)?
    } else {
        let (before, after) = client.update_topic(topic, &members).await.map_err(refused)?;
        match before {
            Some(before) => print_note(&changes(topic, &before, &after)),
            None => print_note(&format!("{topic}: a new policy; members that are not given have their defaults")),
        }
        after
    };
    print_data(&to_json(&policy))
}

/// The members that differ between two policies of a topic, as text.
fn changes(topic: &str, before: &Policy, after: &Policy) -> String {
    let members = |policy| serde_json::to_value(policy).expect("a policy contains only strings and numbers");
    let (before, after) = (members(before), members(after));
    let changed = after.as_object().into_iter().flatten().filter(|(name, value)| before[name.as_str()] != **value);
    let changed: Vec<String> = changed.map(|(name, value)| format!("{name} from {} to {value}", before[name.as_str()])).collect();
    match changed.is_empty() {
        true => format!("{topic}: the policy did not change"),
        false => format!("{topic}: changed {}", changed.join(", ")),
    }
}

/// Adds to a refusal where its member is in the text that the user gave.
fn with_place(source: client::Error, text: &str) -> Error {
    let pointer = source.problem().and_then(|problem| problem.errors.first()).map(|error| error.pointer.as_str());
    let member = pointer.and_then(|pointer| pointer.split('/').nth(1)).map(|name| name.replace("~1", "/").replace("~0", "~"));
    match member.and_then(|member| Some((position(text, &member)?, member))) {
        Some(((line, column), member)) => {
            Error::Member { source, position: format!("the member `{member}` is at line {line}, column {column}") }
        }
        None => source.into(),
    }
}

/// Line and column, from 1, of the first member with this name.
fn position(text: &str, member: &str) -> Option<(usize, usize)> {
    let name = Value::from(member).to_string();
    let is_member = |(index, _): &(usize, &str)| text[index + name.len()..].trim_start().starts_with(':');
    let (index, _) = text.match_indices(&name).find(is_member)?;
    let before = &text[..index];
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    Some((before.matches('\n').count() + 1, before[line_start..].chars().count() + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_count_in_the_given_text() {
        assert_eq!(position(r#"{"max_byte":1}"#, "max_byte"), Some((1, 2)));
        assert_eq!(position("{\n  \"prefix\": \"ü\", \"url_seconds\" : 1}", "url_seconds"), Some((2, 18)));
        assert_eq!(position(r#"{"prefix":"bucket","bucket":null}"#, "bucket"), Some((1, 20)));
        assert_eq!(position("{}", "bucket"), None);
    }

    #[test]
    fn only_changed_members_are_listed() {
        let before = Policy::default();
        let after = Policy { max_bytes: 7, prefix: Some("lake".to_owned()), ..before.clone() };
        let text = changes("videos", &before, &after);
        assert!(text.contains("max_bytes from 5497558138880 to 7"), "{text}");
        assert!(text.contains(r#"prefix from null to "lake""#) && !text.contains("min_bytes"), "{text}");
        assert_eq!(changes("videos", &before, &before), "videos: the policy did not change");
    }
}
