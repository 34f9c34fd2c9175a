package lfsbroker.kafka;

import com.fasterxml.jackson.databind.JsonNode;
import com.sun.net.httpserver.HttpExchange;
import com.sun.net.httpserver.HttpServer;
import java.io.IOException;
import java.io.OutputStream;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.ArrayDeque;
import java.util.List;
import java.util.Map;
import java.util.Queue;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.CopyOnWriteArrayList;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.TimeUnit;

/** An HTTP server on loopback that plays the broker and S3. It gives responses that the real servers give only rarely. */
final class MockServer implements AutoCloseable {
    /** Writes one response. The request body was already read. */
    interface Response {
        void send(HttpExchange exchange, byte[] body) throws IOException;
    }

    /** The requests in order, each as {@code METHOD path}. */
    final List<String> requests = new CopyOnWriteArrayList<>();

    private final Map<String, Queue<Response>> responses = new ConcurrentHashMap<>();
    private final CountDownLatch closed = new CountDownLatch(1);
    private final ExecutorService threads = Executors.newCachedThreadPool();
    private final HttpServer server;

    MockServer() throws IOException {
        server = HttpServer.create(new InetSocketAddress(InetAddress.getLoopbackAddress(), 0), 0);
        server.setExecutor(threads);
        server.createContext("/", this::handle);
        server.start();
    }

    String url() {
        return "http://127.0.0.1:" + server.getAddress().getPort();
    }

    /** Sets the responses to this request, in order. The last response is repeated. */
    MockServer on(String request, Response... inOrder) {
        responses.put(request, new ArrayDeque<>(List.of(inOrder)));
        return this;
    }

    long count(String request) {
        return requests.stream().filter(request::equals).count();
    }

    private void handle(HttpExchange exchange) throws IOException {
        String request = exchange.getRequestMethod() + " " + exchange.getRequestURI();
        byte[] body = exchange.getRequestBody().readAllBytes();
        requests.add(request);
        Queue<Response> queue =
                responses.getOrDefault(request, new ArrayDeque<>(List.of(text(404, "the test set no response to " + request))));
        Response response;
        synchronized (queue) {
            response = queue.size() > 1 ? queue.remove() : queue.element();
        }
        try (exchange) {
            response.send(exchange, body);
        }
    }

    static Response text(int status, String text) {
        return (exchange, body) -> send(exchange, status, text);
    }

    static void send(HttpExchange exchange, int status, String text) throws IOException {
        byte[] bytes = text.getBytes(StandardCharsets.UTF_8);
        exchange.sendResponseHeaders(status, bytes.length == 0 ? -1 : bytes.length);
        exchange.getResponseBody().write(bytes);
    }

    /** Sends nothing until the server is closed. */
    Response noResponse() {
        return (exchange, body) -> waitMillis(60_000);
    }

    /** Sends the headers at once, then one byte after each pause. */
    Response slowly(String text, int pauseMillis) {
        return (exchange, body) -> {
            byte[] bytes = text.getBytes(StandardCharsets.UTF_8);
            exchange.sendResponseHeaders(200, bytes.length);
            OutputStream out = exchange.getResponseBody();
            for (byte single : bytes) {
                waitMillis(pauseMillis);
                out.write(single);
                out.flush();
            }
        };
    }

    private void waitMillis(int millis) throws IOException {
        try {
            if (closed.await(millis, TimeUnit.MILLISECONDS)) {
                throw new IOException("the mock server is closed");
            }
        } catch (InterruptedException error) {
            throw new IOException(error);
        }
    }

    JsonNode presigned(String method, String path) {
        return BrokerClient.MAPPER.createObjectNode().put("method", method).put("url", url() + path);
    }

    BrokerClient client(Duration responseTimeout) {
        return new BrokerClient(new LfsConfig(Map.of("lfs.broker.url", url())), responseTimeout);
    }

    LfsSerializer<byte[]> serializer() {
        LfsSerializer<byte[]> serializer = new LfsSerializer<>();
        serializer.configure(Map.of("lfs.broker.url", url(), "lfs.min.bytes", 1), false);
        return serializer;
    }

    @Override
    public void close() {
        closed.countDown();
        server.stop(0);
        threads.shutdownNow();
    }
}
