//! The client of lfs-broker, for producers and consumers.
//!
//! [`Client::upload`] uploads bytes and publishes their pointer to Kafka. [`Client::fetch`] downloads and verifies the
//! bytes of a pointer. [`Consumer`] opens any record of a topic. [`Client`] also has a method for each route. [`api`]
//! holds the requests, responses and problems of the HTTP interface, [`mod@pointer`] the value of the record in Kafka,
//! and [`checksum`] the digests. This crate contains no server code.
//!
//! This crate says *upload*. The broker's database calls the same thing *session*, S3 calls its bytes *object*, and the
//! record in Kafka is its *pointer*.
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
//! // Any Kafka client works: pass the value and the headers of a record, and read its verified bytes.
//! let consumer = Consumer::new(Client::new("http://127.0.0.1:8080")?);
//! consumer.open_record("videos", value, headers).await?.content.save("order-17.mp4").await?;
//! # Ok(())
//! # }
//! ```
//! A consumer with its own S3 credentials needs no broker: see [`Resolver::with_access`].
//!
//! # Resuming an upload
//! ```no_run
//! # async fn resume(client: lfs_broker_client::Client, id: uuid::Uuid) -> Result<(), lfs_broker_client::Error> {
//! tokio::select! {
//!     completed = client.upload("videos").resume(id, "order-17.mp4") => println!("{:?}", completed?.pointer),
//!     // Dropping the future leaves the upload open at the broker, for the next attempt.
//!     _ = tokio::signal::ctrl_c() => eprintln!("upload {id} can be resumed until it expires"),
//! }
//! # Ok(())
//! # }
//! ```
//! [`Uploader::cancelled_by`] does the opposite: it aborts the upload.
#![deny(missing_docs)]

pub mod api;
pub mod checksum;
#[doc(hidden)]
pub mod json_words;
pub mod pointer;

pub mod access;
pub mod consumer;
pub mod http;
pub mod resolve;
pub mod upload;

mod download;
mod error;
mod http_client;
mod options;
mod parts;
mod progress;
mod retry;
mod save;
mod source;
mod storage;
mod transfer;
mod transport;

#[cfg(feature = "keys")]
pub use access::Keys;
pub use access::{Access, ObjectLocation};
pub use consumer::Consumer;
pub use download::Download;
pub use error::Error;
pub use http::Client;
pub use http_client::Settings;
pub use options::UploadOptions;
pub use progress::Progress;
pub use resolve::{Resolver, Value};
pub use retry::{Retry, RetryEvent};
pub use save::{SavedFile, remove_partial_downloads};
pub use upload::Uploader;

/// Compiles the example of the README as a documentation test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
