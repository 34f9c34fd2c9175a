//! Toxiproxy: every connection between the servers goes through it, and its HTTP API adds and removes toxics.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use crate::Failure;
use crate::plan::{Link, Toxic};

/// The proxies, with the port that each listens on.
pub(crate) struct Proxies {
    api: String,
    http: reqwest::Client,
    ports: BTreeMap<Link, u16>,
}

impl Proxies {
    /// Uses the toxiproxy server whose API is on this port.
    pub(crate) fn at(port: u16, http: reqwest::Client) -> Self {
        Self { api: format!("http://127.0.0.1:{port}"), http, ports: BTreeMap::new() }
    }

    /// Creates a proxy from `listen` to `upstream`.
    pub(crate) async fn create(&mut self, link: Link, listen: u16, upstream: u16) -> Result<(), Failure> {
        let body = json!({
            "name": link.to_string(), "enabled": true,
            "listen": format!("127.0.0.1:{listen}"), "upstream": format!("127.0.0.1:{upstream}"),
        });
        self.ports.insert(link, listen);
        self.call("POST", "/proxies", Some(&body)).await
    }

    /// `host:port` of a link's proxy.
    pub(crate) fn address(&self, link: Link) -> String {
        format!("127.0.0.1:{}", self.ports[&link])
    }

    /// Starts a network fault on a link.
    pub(crate) async fn add_toxic(&self, link: Link, toxic: Toxic) -> Result<(), Failure> {
        let (kind, stream, attributes) = match toxic {
            // With timeout 0 toxiproxy drops all data until the toxic is removed, and then closes the connection.
            Toxic::LostRequests => ("timeout", "upstream", json!({"timeout": 0})),
            Toxic::LostResponses => ("timeout", "downstream", json!({"timeout": 0})),
            Toxic::CutRequests(bytes) => ("limit_data", "upstream", json!({"bytes": bytes})),
            Toxic::CutResponses(bytes) => ("limit_data", "downstream", json!({"bytes": bytes})),
            Toxic::Reset => ("reset_peer", "downstream", json!({"timeout": 0})),
            Toxic::Slow(millis) => ("latency", "downstream", json!({"latency": millis, "jitter": millis / 2})),
            Toxic::Refused => return self.enable(link, false).await,
        };
        let body = json!({"name": "toxic", "type": kind, "stream": stream, "toxicity": 1.0, "attributes": attributes});
        self.call("POST", &format!("/proxies/{link}/toxics"), Some(&body)).await
    }

    /// Ends a network fault on a link.
    pub(crate) async fn remove_toxic(&self, link: Link, toxic: Toxic) -> Result<(), Failure> {
        match toxic {
            Toxic::Refused => self.enable(link, true).await,
            _ => self.call("DELETE", &format!("/proxies/{link}/toxics/toxic"), None).await,
        }
    }

    async fn enable(&self, link: Link, enabled: bool) -> Result<(), Failure> {
        self.call("POST", &format!("/proxies/{link}"), Some(&json!({"enabled": enabled}))).await
    }

    async fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Result<(), Failure> {
        let method: reqwest::Method = method.parse().map_err(|_| Failure(format!("{method} is not an HTTP method")))?;
        let mut request = self.http.request(method.clone(), format!("{}{path}", self.api)).timeout(Duration::from_secs(20));
        if let Some(body) = body {
            request = request.json(body);
        }
        let failed = |reason: String| Failure(format!("toxiproxy: {method} {path}: {reason}"));
        let response = request.send().await.map_err(|error| failed(error.to_string()))?;
        let (status, text) = (response.status(), response.text().await.unwrap_or_default());
        if status.is_success() { Ok(()) } else { Err(failed(format!("{status} {text}"))) }
    }
}
