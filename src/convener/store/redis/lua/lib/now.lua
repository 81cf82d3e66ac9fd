-- `now`: the store's clock in ms since 1970. `text`: a number as digits (`..` would round above 14 digits).
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local function text(number) return string.format('%.0f', number) end
