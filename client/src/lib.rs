//! The contract of lfs-broker as code: what a producer or a consumer builds against.
//!
//! [`Client::upload`] takes bytes to a pointer in Kafka, [`Client::fetch`] takes a pointer back to verified
//! bytes, and [`Consumer`] opens whatever records a topic has. Beneath them [`Client`] has a verb for each route,
//! [`api`] the requests, answers and problems of the HTTP interface, [`mod@pointer`] the value of the record in Kafka,
//! [`checksum`] the digests that all speak of. Nothing here knows a server.
//!
//! Where this crate says *upload*, the broker's database says *session*, S3 says *object*
//! and Kafka says *pointer*: one thing at four stations.
//!
//! # A producer
//! ```no_run
//! use lfs_broker_client::{Client, UploadOptions};
//!
//! # async fn produce(token: &str) -> Result<(), lfs_broker_client::Error> {
//! let client = Client::new("http://127.0.0.1:8080")?.with_token(token);
//! let completed = client
//!     .upload(UploadOptions {
//!         key: Some("order-17".into()),
//!         content_type: Some("video/mp4".to_owned()),
//!         wait_published: true,
//!         ..UploadOptions::to("videos")
//!     })
//!     .on_open(|upload| eprintln!("upload {}", upload.id))
//!     .on_progress(|progress| eprintln!("{} of {} bytes", progress.bytes_done, progress.bytes_total))
//!     .file("order-17.mp4")
//!     .await?;
//! println!("{:?}", completed.record);
//! # Ok(())
//! # }
//! ```
//!
//! # A consumer
//! ```no_run
//! use lfs_broker_client::{Client, Consumer};
//!
//! # async fn consume(value: Option<&[u8]>, headers: Vec<(&str, &[u8])>) -> Result<(), lfs_broker_client::Error> {
//! // With any Kafka client: the value and the headers of a record in, its bytes out, verified.
//! let consumer = Consumer::new(Client::new("http://127.0.0.1:8080")?);
//! consumer.open_record("videos", value, headers).await?.content.save("order-17.mp4").await?;
//! # Ok(())
//! # }
//! ```
//! A consumer with own rights in S3 needs no broker: see [`Resolver::with_access`].
//!
//! # An upload that was interrupted
//! ```no_run
//! # async fn resume(client: lfs_broker_client::Client, id: uuid::Uuid) -> Result<(), lfs_broker_client::Error> {
//! tokio::select! {
//!     completed = client.upload("videos").resume(id, "order-17.mp4") => println!("{:?}", completed?.pointer),
//!     // What is dropped stays open at the broker, for the next attempt.
//!     _ = tokio::signal::ctrl_c() => eprintln!("upload {id} can be resumed until it expires"),
//! }
//! # Ok(())
//! # }
//! ```
//! [`Uploader::cancelled_by`] is for the opposite: it takes the upload back.
#![deny(missing_docs)]

pub mod api;
pub mod checksum;
pub mod pointer;

pub mod access;
pub mod consumer;
pub mod http;
pub mod resolve;
pub mod upload;

mod download;
mod error;
mod options;
mod parts;
mod progress;
mod retry;
mod save;
mod source;
mod storage;
mod transfer;

#[cfg(feature = "keys")]
pub use access::Keys;
pub use access::{Access, Place};
pub use consumer::Consumer;
pub use download::Download;
pub use error::Error;
pub use http::{Client, Settings};
pub use options::UploadOptions;
pub use progress::Progress;
pub use resolve::{Resolver, Value};
pub use retry::Retry;
pub use save::{Saved, clean};
pub use upload::Uploader;
