"""Your own FastAPI app with a model in it: OpenAI's API under /ai, and a route of yours that asks the same model.

python examples/own_app.py [PORT]
curl http://127.0.0.1:8000/ai/v1/models
curl --data-binary @examples/pictures/shapes.png http://127.0.0.1:8000/caption
"""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

import vlserve

pipe = vlserve.VLPipeline("demo", wait=False, kv_cache_gib=0.2)  # loads while the app starts; /ai/health says when it is there


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    with pipe:
        yield


app = FastAPI(title="Pictures", lifespan=lifespan)
app.include_router(vlserve.router(pipe), prefix="/ai")


@app.post("/caption")
async def caption(request: Request) -> dict[str, str]:
    answer = await pipe.agenerate(("Describe the picture.", await request.body()), max_tokens=32)
    return {"caption": answer.text}


@app.exception_handler(vlserve.VLServeError)
async def refused(request: Request, error: vlserve.VLServeError) -> JSONResponse:
    return JSONResponse({"problem": str(error)}, 400 if isinstance(error, vlserve.RequestError) else 503)


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]) if sys.argv[1:] else 8000)
