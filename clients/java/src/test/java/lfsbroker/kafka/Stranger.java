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

/** A broker and an S3 on loopback that answer what a test tells them to, in the ways that the real ones do only now and then. */
final class Stranger implements AutoCloseable {
    /** One answer: to the request, whose body is read already. */
    interface Answer {
        void to(HttpExchange exchange, byte[] body) throws IOException;
    }

    /** What was asked, as METHOD and path, in order. */
    final List<String> asked = new CopyOnWriteArrayList<>();

    private final Map<String, Queue<Answer>> answers = new ConcurrentHashMap<>();
    private final CountDownLatch end = new CountDownLatch(1);
    private final ExecutorService threads = Executors.newCachedThreadPool();
    private final HttpServer server;

    Stranger() throws IOException {
        server = HttpServer.create(new InetSocketAddress(InetAddress.getLoopbackAddress(), 0), 0);
        server.setExecutor(threads);
        server.createContext("/", this::handle);
        server.start();
    }

    String url() {
        return "http://127.0.0.1:" + server.getAddress().getPort();
    }

    /** What these requests are answered with, one after the other; the last answer stays. */
    Stranger on(String request, Answer... inOrder) {
        answers.put(request, new ArrayDeque<>(List.of(inOrder)));
        return this;
    }

    long count(String request) {
        return asked.stream().filter(request::equals).count();
    }

    private void handle(HttpExchange exchange) throws IOException {
        String request = exchange.getRequestMethod() + " " + exchange.getRequestURI();
        byte[] body = exchange.getRequestBody().readAllBytes();
        asked.add(request);
        Queue<Answer> queue = answers.getOrDefault(request, new ArrayDeque<>(List.of(text(404, "nobody answers " + request))));
        Answer answer;
        synchronized (queue) {
            answer = queue.size() > 1 ? queue.remove() : queue.element();
        }
        try (exchange) {
            answer.to(exchange, body);
        }
    }

    static Answer text(int status, String text) {
        return (exchange, body) -> send(exchange, status, text);
    }

    static void send(HttpExchange exchange, int status, String text) throws IOException {
        byte[] bytes = text.getBytes(StandardCharsets.UTF_8);
        exchange.sendResponseHeaders(status, bytes.length == 0 ? -1 : bytes.length);
        exchange.getResponseBody().write(bytes);
    }

    /** Nothing, until the test is over. */
    Answer silence() {
        return (exchange, body) -> stand(60_000);
    }

    /** One byte at a time. */
    Answer slowly(String text, int pauseMillis) {
        return (exchange, body) -> {
            byte[] bytes = text.getBytes(StandardCharsets.UTF_8);
            exchange.sendResponseHeaders(200, bytes.length);
            OutputStream out = exchange.getResponseBody();
            for (byte one : bytes) {
                stand(pauseMillis);
                out.write(one);
                out.flush();
            }
        };
    }

    private void stand(int millis) throws IOException {
        try {
            if (end.await(millis, TimeUnit.MILLISECONDS)) {
                throw new IOException("the test is over");
            }
        } catch (InterruptedException error) {
            throw new IOException(error);
        }
    }

    JsonNode signed(String method, String path) {
        return Broker.MAPPER.createObjectNode().put("method", method).put("url", url() + path);
    }

    Broker broker(Duration patience) {
        return new Broker(new LfsConfig(Map.of("lfs.broker.url", url())), patience);
    }

    LfsSerializer<byte[]> serializer() {
        LfsSerializer<byte[]> serializer = new LfsSerializer<>();
        serializer.configure(Map.of("lfs.broker.url", url(), "lfs.min.bytes", 1), false);
        return serializer;
    }

    @Override
    public void close() {
        end.countDown();
        server.stop(0);
        threads.shutdownNow();
    }
}
