//! A TCP proxy that gives the mock cluster a port of the caller's choice.
//!
//! The mock cluster listens on a random port and names this port to its clients, which then connect to it directly. So
//! the proxy also replaces the port in the two responses that contain addresses: `Metadata` and `FindCoordinator`. Both
//! ports are encoded in four bytes, so the length of the response does not change.

use std::collections::HashSet;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Mutex, PoisonError};

use tokio::io::{AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

/// The API keys of the requests whose responses contain addresses.
const METADATA: u16 = 3;
const FIND_COORDINATOR: u16 = 10;

/// A request begins with its API key (2 bytes), its version (2) and its correlation id (4).
const REQUEST_HEADER_BYTES: u32 = 8;

/// A running proxy. It stops when it is dropped.
pub(super) struct Proxy {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Proxy {
    /// Listens on a port of 127.0.0.1, or on a free port if `port` is 0.
    pub(super) async fn start(port: u16, cluster: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await?;
        let address = listener.local_addr()?;
        Ok(Self { address, task: tokio::spawn(run(listener, Ports { cluster, proxy: address.port() })) })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The address of the mock cluster, and the port that its clients must see instead.
#[derive(Clone, Copy)]
struct Ports {
    cluster: SocketAddr,
    proxy: u16,
}

async fn run(listener: TcpListener, ports: Ports) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((client, _)) => drop(connections.spawn(serve(client, ports))),
                Err(error) => {
                    // Most likely no file descriptor is free. Retry after a short wait.
                    tracing::warn!(%error, "the embedded kafka could not accept a connection, retrying in 50 ms");
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn serve(client: TcpStream, ports: Ports) {
    // An error is a closed connection, which the client reports and retries.
    if let Err(error) = forward(client, ports).await {
        tracing::debug!(%error, "a connection to the embedded kafka failed");
    }
}

async fn forward(mut client: TcpStream, ports: Ports) -> io::Result<()> {
    let mut cluster = TcpStream::connect(ports.cluster).await?;
    client.set_nodelay(true)?;
    cluster.set_nodelay(true)?;
    let (from_client, to_client) = client.split();
    let (from_cluster, to_cluster) = cluster.split();
    // The correlation ids of the requests whose responses contain addresses.
    let with_address = Mutex::new(HashSet::new());
    tokio::try_join!(
        forward_requests(BufReader::new(from_client), to_cluster, &with_address),
        forward_responses(BufReader::new(from_cluster), to_client, &with_address, ports),
    )?;
    Ok(())
}

async fn forward_requests(
    mut from: impl AsyncBufRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    with_address: &Mutex<HashSet<u32>>,
) -> io::Result<()> {
    while let Some(length) = read_length(&mut from).await? {
        let rest = length.checked_sub(REQUEST_HEADER_BYTES).ok_or(io::ErrorKind::InvalidData)?;
        let header = from.read_u64().await?;
        let (api_key, correlation_id) = ((header >> 48) as u16, header as u32);
        if matches!(api_key, METADATA | FIND_COORDINATOR) {
            with_address.lock().unwrap_or_else(PoisonError::into_inner).insert(correlation_id);
        }
        to.write_all(&[&length.to_be_bytes()[..], &header.to_be_bytes()].concat()).await?;
        copy(&mut from, &mut to, rest).await?;
    }
    to.shutdown().await
}

async fn forward_responses(
    mut from: impl AsyncBufRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    with_address: &Mutex<HashSet<u32>>,
    ports: Ports,
) -> io::Result<()> {
    while let Some(length) = read_length(&mut from).await? {
        let rest = length.checked_sub(size_of::<u32>() as u32).ok_or(io::ErrorKind::InvalidData)?;
        let correlation_id = from.read_u32().await?;
        to.write_all(&[length.to_be_bytes(), correlation_id.to_be_bytes()].concat()).await?;
        let has_address = with_address.lock().unwrap_or_else(PoisonError::into_inner).remove(&correlation_id);
        if has_address {
            let mut body = Vec::new();
            copy(&mut from, &mut body, rest).await?;
            replace_port(&mut body, ports);
            to.write_all(&body).await?;
        } else {
            copy(&mut from, &mut to, rest).await?;
        }
    }
    to.shutdown().await
}

/// The length of the next request or response, or `None` if the peer has closed the connection.
async fn read_length(from: &mut (impl AsyncBufRead + Unpin)) -> io::Result<Option<u32>> {
    if from.fill_buf().await?.is_empty() { Ok(None) } else { from.read_u32().await.map(Some) }
}

/// Copies exactly `length` bytes.
async fn copy(from: &mut (impl AsyncBufRead + Unpin), to: &mut (impl AsyncWrite + Unpin), length: u32) -> io::Result<()> {
    let copied = tokio::io::copy_buf(&mut from.take(length.into()), to).await?;
    if copied < length.into() { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
}

/// Replaces the cluster's port after each occurrence of its host. In every version of both responses, the port follows the
/// host as a 32-bit number. No other field contains such bytes.
fn replace_port(body: &mut [u8], ports: Ports) {
    let encode = |port: u16| [ports.cluster.ip().to_string().as_bytes(), &u32::from(port).to_be_bytes()].concat();
    let (found, replacement) = (encode(ports.cluster.port()), encode(ports.proxy));
    let mut start = 0;
    while let Some(index) = body[start..].windows(found.len()).position(|window| window == found) {
        start += index;
        body[start..start + found.len()].copy_from_slice(&replacement);
        start += found.len();
    }
}
