//! tmp
#[tokio::main]
async fn main() {
    tracing_subscriber::fmt().with_env_filter("lfs_broker=debug,warn").init();
    let s = lfs_broker::config::load(None, |n| std::env::var(n).ok()).unwrap();
    let st = lfs_broker::store::Store::connect(&s.store).unwrap();
    st.migrate().await.unwrap();
    let r = lfs_broker::app::start(s).await.unwrap();
    tokio::signal::ctrl_c().await.unwrap();
    r.stop().await;
}
